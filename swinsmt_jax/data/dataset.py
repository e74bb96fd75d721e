"""What a dataset's folder holds: classes, splits, and where the files of a case lie.

TotalSegmentator's layout is built in, and nnU-Net's (`dataset.json`, imagesTr, ...) is
recognised. Any other is described by a JSON file:

    {"classes": ["liver", "spleen"],             label ids 1, 2, ...; or "v1", "v2"
     "groups": {"organs": ["liver", "spleen"]},  columns of the results; may be absent
     "image": "{case}/ct.nii.gz",
     "labels": "{case}/labels.nii.gz",           one file of label ids, or
     "masks": "{case}/{class}.nii.gz",           one file for each class
     "splits": {"train": ["a", "b"], "val": ["c"], "test": []}}   or "meta.csv"

Paths are relative to the folder of the dataset.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from swinsmt_jax import checks, class_map
from swinsmt_jax.class_map import ClassMap
from swinsmt_jax.data import nnunet, totalsegmentator
from swinsmt_jax.data.totalsegmentator import CLASS, META, Case

DESCRIPTION = "dataset.json"
KEYS = ("classes", "groups", "image", "labels", "masks", "splits")


@dataclass(frozen=True)
class Dataset:
    """A dataset on disk.

    Attributes:
        root: its folder.
        classes: of its label ids.
        splits: {case: split}.
        find: (case, split) to its files; a `UserError` if they are not there.
        refused: {case or line: reason} of entries that cannot be used.
    """

    root: Path
    classes: ClassMap
    splits: Mapping[str, str]
    find: Callable[[str, str], Case]
    refused: Mapping[str, str] = field(default_factory=dict)


def open_dataset(root: str | Path, *, description: str = "") -> Dataset:
    """Find the cases of a dataset.

    Args:
        root: its folder.
        description: a JSON file as above, or a version of TotalSegmentator's class
            map. If empty: the folder's own dataset.json, or else TotalSegmentator v2.

    Raises:
        UserError: for a folder or description that is missing or cannot be used; the
            message names the key.
    """
    root = Path(root)
    if description in class_map.VERSIONS:
        return _totalsegmentator(root, class_map.VERSIONS[description])
    file = Path(description) if description else root / DESCRIPTION
    if not description and not file.is_file():
        return _totalsegmentator(root, class_map.V2)
    checks.require(
        file.is_file(),
        f"the description {description} does not exist; give a JSON file, or one of "
        f"{', '.join(class_map.VERSIONS)} for TotalSegmentator's layout.",
    )
    try:
        content = json.loads(file.read_text(encoding="utf-8-sig"))
    except ValueError as error:
        raise checks.UserError(f"{file} is not JSON: {error}.") from error
    checks.require(
        isinstance(content, dict),
        f"{file} holds {type(content).__name__}, but must hold an object.",
    )
    if nnunet.describes(content):
        refused: dict[str, str] = {}
        found = nnunet.read(root, content, where=str(file), refused=refused)
        return Dataset(root, *found, refused)
    return _described(root, content, where=str(file))


def _totalsegmentator(root, classes):
    refused: dict[str, str] = {}
    splits = totalsegmentator.read_meta(root, refused=refused)

    def find(name, split):
        return totalsegmentator.case_of(root, name, split)

    return Dataset(root, classes, splits, find, refused)


def _described(root, content, *, where):
    for key in content:
        checks.one_of(f"a key of {where}", key, KEYS)
    for key in ("classes", "image", "splits"):
        checks.require(key in content, f"{where} lacks the key {key!r}.")
    patterns = {key: content.get(key) for key in ("image", "labels", "masks")}
    checks.require(
        (patterns["labels"] is None) != (patterns["masks"] is None),
        f"{where} must have one of the keys 'labels' (a file of label ids) and 'masks' "
        "(a file for each class).",
    )
    for key, pattern in patterns.items():
        wanted = ("{case}", CLASS) if key == "masks" else ("{case}",)
        checks.require(
            pattern is None
            or (isinstance(pattern, str) and all(x in pattern for x in wanted))
            and pattern.count(CLASS) == (key == "masks"),
            f"{where}: {key} is {pattern!r}, but must be a path with "
            f"{' and '.join(wanted)} in it.",
        )
    classes, groups = content["classes"], content.get("groups", {})
    if isinstance(classes, str):
        classes = class_map.from_json(classes, where=where)
    else:
        classes = class_map.make(classes, groups, where=where)
    refused: dict[str, str] = {}
    splits = _splits(root, content["splits"], refused, where=where)

    def path(key, name):
        return root / patterns[key].replace("{case}", name)

    def find(name, split):
        segmentation = path("labels" if patterns["labels"] else "masks", name)
        return totalsegmentator.require_files(
            Case(name, path("image", name), split, segmentation)
        )

    return Dataset(root, classes, splits, find, refused)


def _splits(root, splits, refused, *, where):
    """Return {case: split}, from meta.csv or from lists of cases."""
    if splits == META:
        return totalsegmentator.read_meta(root, refused=refused)
    checks.require(root.is_dir(), f"data folder {root} does not exist.")
    checks.require(
        isinstance(splits, dict) and all(isinstance(x, list) for x in splits.values()),
        f"{where}: splits is {splits!r}, but must be {META!r} or "
        '{"train": [cases], "val": [cases], "test": [cases]}.',
    )
    found: dict[str, str] = {}
    for split, names in splits.items():
        checks.one_of(f"{where}: a split", split, totalsegmentator.SPLITS)
        for name in names:
            entry = f"{name!r} of the split {split!r}"
            try:
                totalsegmentator.require_id(f"{where}: a case of {split!r}", name)
                entry = name
                checks.require(
                    name not in found,
                    f"{where}: splits lists the case {name!r} more than once.",
                )
                found[name] = split
            except checks.UserError as error:
                refused[entry] = str(error)
    return {name: split for name, split in found.items() if name not in refused}
