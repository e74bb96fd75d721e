"""The entry to datasets on disk, in any layout of `data/layouts`."""

from pathlib import Path

from swinsmt_jax import checks, class_map
from swinsmt_jax.data import folds, layouts
from swinsmt_jax.data.case import Case, Dataset
from swinsmt_jax.data.layouts import totalsegmentator
from swinsmt_jax.runtime.files import absolute, read_json

DESCRIPTION = "dataset.json"


def open_dataset(root: str | Path, *, description: str = "") -> Dataset:
    """Find the cases of a dataset.

    Args:
        root: its folder.
        description: a JSON file as in `layouts.described`, or a version of
            TotalSegmentator's class map. If empty, the folder's own dataset.json, if
            any.

    Raises:
        UserError: for a missing or unusable folder or description; the message names
            the key.
    """
    root = absolute(root)
    if description in class_map.VERSIONS:
        classes = class_map.VERSIONS[description]
        return totalsegmentator.read(root, {}, classes=classes)
    file = absolute(description) if description else root / DESCRIPTION
    content = _description(file) if description else description_of(root)
    found = layouts.recognised(root, content).read(root, content, where=str(file))
    checks.require(
        bool(found.splits or found.refused),
        f"{root} lists no cases: its table of splits has no lines below the header.",
    )
    return found


def find_cases(
    root: str | Path, *, split: str, description: str = "", fold: int = -1
) -> tuple[Case, ...]:
    """List the cases of a split, in the dataset's order.

    Args:
        root, description: as in `open_dataset`.
        split: "train", "val" or "test".
        fold: of a cross-validation, which redistributes training and validation cases;
            -1 takes the dataset's own splits.

    Raises:
        UserError: as `open_dataset`, for an unusable entry, and an empty split.
    """
    found = open_dataset(root, description=description)
    splits = folds.divided(found.splits, fold, folds=found.folds)
    return found.of_split(split, splits=splits)


def description_of(root: Path) -> dict:
    """Return the folder's own description, or {}."""
    file = root / DESCRIPTION
    return _description(file) if file.is_file() else {}


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
