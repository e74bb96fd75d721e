"""A layout that a JSON file describes, dataset.json in the folder or elsewhere.

{"classes": ["liver", "spleen"],             label ids 1, 2, ...; or "v1", "v2"
 "groups": {"organs": ["liver", "spleen"]},  columns of the results; may be absent
 "image": "{case}/ct.nii.gz",
 "labels": "{case}/labels.nii.gz",           one file of label ids, or
 "masks": "{case}/{class}.nii.gz",           one file for each class
 "missing_masks": "absent",                  or "refused", or "unannotated"
 "annotated": ["liver"],                     the classes that are; or {case: [classes]}
 "modality": "CT",                           another is not expected to be in HU
 "splits": {"train": ["a", "b"], "val": ["c"], "test": []}}   or "meta.csv"

Paths are relative to the folder of the dataset. Class names have no comma, because it
separates lists on the command line.
"""

from dataclasses import replace
from pathlib import Path

from swinsmt_jax import checks, class_map
from swinsmt_jax.class_map import class_key
from swinsmt_jax.data import meta
from swinsmt_jax.data.case import CLASS, Case, Dataset, require_files

TITLE = "described by a JSON file of its own"
KEYS = ["classes", "groups", "image", "labels", "masks", "splits", "modality"]
KEYS += ["missing_masks", "annotated"]
MISSING = ("absent", "refused", "unannotated")


def fits(root: Path, content: dict) -> bool:
    """Take every description that is not another layout's."""
    return bool(content)


def read(root: Path, content: dict, *, where: str) -> Dataset:
    """List the cases; a `UserError` names an unusable key."""
    patterns = _patterns(content, where)
    classes = content["classes"]
    if isinstance(classes, str):
        classes = class_map.from_json(classes, where=where)
    else:
        _require_no_commas(classes, where)
        classes = class_map.make(classes, content.get("groups", {}), where=where)

    modality = content.get("modality", "CT")
    checks.require(
        isinstance(modality, str) and modality != "",
        f"{where}: modality is {modality!r}, but must be a name, such as 'MR'.",
    )

    missing = content.get("missing_masks", MISSING[0])
    checks.one_of(f"{where}: missing_masks", missing, MISSING)

    annotated = _annotated(content.get("annotated"), classes, where)

    def path(key, name):
        return root / patterns[key].replace("{case}", name)

    def find(name, split):
        segmentation = path("labels" if patterns["labels"] else "masks", name)
        image = path("image", name)
        case = Case(name, image, split, segmentation, modality, classes)
        case = replace(case, absent=missing == "absent", annotated=annotated(name))
        return require_files(replace(case, unmasked=missing == "unannotated"))

    refused: dict[str, str] = {}
    splits = _splits(root, content["splits"], refused, where=where)
    return Dataset(root, classes, splits, find, refused)


def _require_no_commas(names, where):
    """Refuse names that no list of classes can contain; later code checks types."""
    for name in names if isinstance(names, list) else ():
        checks.require(
            not isinstance(name, str) or "," not in name,
            f"{where}: classes holds {name!r}, but lists of classes on the command "
            "line are split at commas. Rename it in the description, and its masks if "
            f"it has any, such as to {class_map.safe_name(str(name))!r}.",
        )


def _annotated(found, classes, where):
    """Return the function from a case to the names of its classes, None for all."""
    lists = found if isinstance(found, dict) else {} if found is None else {"": found}
    keys = classes.ids_by_key()
    for case, names in lists.items():
        checks.require(
            isinstance(names, list) and all(isinstance(name, str) for name in names),
            f"{where}: annotated is {found!r}, but must list classes, or be "
            '{"case": [classes]}.',
        )
        for name in names:
            checks.require(
                keys.get(class_key(name), 0) > 0,
                f"{where}: annotated{f' of {case!r}' if case else ''} names {name!r}, "
                f"but the classes are {checks.few(classes.names[1:])}.",
            )

    def of(case):
        names = lists.get(case if isinstance(found, dict) else "")
        return None if names is None else tuple(names)

    return of


def _patterns(content, where):
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
    return patterns


def _splits(root, splits, refused, *, where):
    """Return {case: split}, from meta.csv or from lists of cases."""
    checks.require(root.is_dir(), f"data folder {root} does not exist.")
    if splits == meta.META:
        return meta.read(root, refused=refused)
    checks.require(
        isinstance(splits, dict) and all(isinstance(x, list) for x in splits.values()),
        f"{where}: splits is {splits!r}, but must be {meta.META!r} or "
        '{"train": [cases], "val": [cases], "test": [cases]}.',
    )
    for split in splits:
        checks.one_of(f"{where}: a split", split, meta.SPLITS)
    entries = (
        (f"{name!r} of the split {split!r}", name, split)
        for split, names in splits.items()
        for name in names
    )
    return meta.collect(entries, refused=refused)
