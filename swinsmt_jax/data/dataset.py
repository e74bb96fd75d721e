"""The door to datasets on disk, of any layout of `data/layouts`."""

from pathlib import Path

from swinsmt_jax import checks, class_map
from swinsmt_jax.data import layouts
from swinsmt_jax.data.case import Dataset
from swinsmt_jax.data.layouts import totalsegmentator
from swinsmt_jax.runtime.files import absolute, read_json

DESCRIPTION = "dataset.json"


def open_dataset(root: str | Path, *, description: str = "") -> Dataset:
    """Find the cases of a dataset.

    Args:
        root: its folder.
        description: a JSON file as in `layouts.described`, or a version of
            TotalSegmentator's class map. If empty: the folder's own dataset.json, if it
            has one.

    Raises:
        UserError: for a folder or description that is missing or cannot be used; the
            message names the key.
    """
    root = absolute(root)
    if description in class_map.VERSIONS:
        classes = class_map.VERSIONS[description]
        return totalsegmentator.read(root, {}, classes=classes)
    file = absolute(description) if description else root / DESCRIPTION
    content = {}
    if description or file.is_file():
        content = _description(file)
    found = layouts.recognised(root, content).read(root, content, where=str(file))
    checks.require(
        bool(found.splits or found.refused),
        f"{root} lists no cases: its table of splits has no lines below the header.",
    )
    return found


def require_totalsegmentator(root: str | Path) -> None:
    """Raise `UserError` for a dataset of another layout, of which a store is needed."""
    root = absolute(root)
    file = root / DESCRIPTION
    layout = layouts.recognised(root, _description(file) if file.is_file() else {})
    checks.require(
        layout is totalsegmentator,
        f"{root} is a dataset whose layout is {layout.TITLE}; make a store of it with "
        "preprocess.py, and give that as data.root.",
    )


def _description(file):
    """Read a description that is not empty."""
    checks.require(
        file.is_file(),
        f"the description {file} does not exist; give a JSON file, or one of "
        f"{', '.join(class_map.VERSIONS)} for TotalSegmentator's layout.",
    )
    try:
        content = read_json(file)
    except ValueError as error:
        raise checks.UserError(f"{file} is not JSON: {error}.") from error
    checks.require(
        isinstance(content, dict) and len(content) > 0,
        f"{file} holds {type(content).__name__}, but must hold an object with keys.",
    )
    return content
