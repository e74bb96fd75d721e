"""nnU-Net's layout: dataset.json, imagesTr, labelsTr, and imagesTs, labelsTs.

Images are named <case>_0000.nii.gz (version 2), or <case>.nii.gz as in the Medical
Segmentation Decathlon (version 1). Validation cases are those of the first fold of
splits_final.json if the folder has that file, and otherwise every fifth case in the
order of names. Test cases are those of imagesTs that have labels in labelsTs.
"""

import json
from collections.abc import Callable
from pathlib import Path

from swinsmt_jax import checks, class_map
from swinsmt_jax.class_map import ClassMap
from swinsmt_jax.data.totalsegmentator import Case, require_files, require_id

FOLDERS = {"train": ("imagesTr", "labelsTr"), "test": ("imagesTs", "labelsTs")}
SPLITS_FILE = "splits_final.json"
FIFTH = 5
ENDINGS = (".nii.gz", ".nii")


def describes(content: dict) -> bool:
    """Whether a JSON object is nnU-Net's description of a dataset."""
    return "labels" in content and bool({"channel_names", "modality"} & content.keys())


def read(
    root: Path, content: dict, *, where: str
) -> tuple[ClassMap, dict[str, str], Callable[[str, str], Case]]:
    """Return classes, {case: split} and the function from (case, split) to files.

    Raises:
        UserError: for several channels, regions, ids with gaps, files that are not
            NIfTI, and a folder without labels.
    """
    classes = _classes(content["labels"], where)
    channels = content.get("channel_names", content.get("modality"))
    checks.require(
        len(channels) == 1,
        f"{where} has the channels {channels}, but one, the CT, is needed.",
    )
    ending = content.get("file_ending", ENDINGS[0])
    checks.one_of(f"{where}: file_ending", ending, ENDINGS)

    def find(name, split):
        images, segmentations = FOLDERS["test" if split == "test" else "train"]
        new = root / images / f"{name}_0000{ending}"
        old = root / images / f"{name}{ending}"
        image = old if old.is_file() and not new.is_file() else new
        label = root / segmentations / f"{name}{ending}"
        return require_files(Case(name, image, split, label))

    return classes, _splits(root, ending), find


def _classes(found, where):
    checks.require(
        isinstance(found, dict) and len(found) > 1,
        f"{where}: labels is {found!r}, but must be {{name: id}}.",
    )
    if all(str(key).isdecimal() for key in found):  # version 1: {id: name}
        found = {name: int(number) for number, name in found.items()}
    checks.require(
        all(type(number) is int for number in found.values()),
        f"{where}: labels are {found}, but each must be one number; regions made of "
        "several labels are not supported: name the labels themselves.",
    )
    checks.require(
        "ignore" not in found,
        f"{where}: the label 'ignore' is not supported: every voxel must be labelled.",
    )
    names = sorted(found, key=found.get)
    checks.require(
        sorted(found.values()) == list(range(len(found))),
        f"{where}: labels have the ids {sorted(found.values())}, but must be 0 for the "
        f"background and then 1, 2, ..., {len(found) - 1}.",
    )
    return class_map.make(names[1:], {}, where=where)


def _splits(root, ending):
    """Return {case: split} of the cases that have labels."""
    names = {s: _names(root / folder, ending) for s, (_, folder) in FOLDERS.items()}
    checks.require(
        bool(names["train"]),
        f"{root / FOLDERS['train'][1]} holds no *{ending}, but nnU-Net's layout has "
        "the labels of the training cases there.",
    )
    file, held_out = root / SPLITS_FILE, names["train"][FIFTH - 1 :: FIFTH]
    if file.is_file():
        try:
            held_out = json.loads(file.read_text())[0]["val"]
        except (ValueError, LookupError, TypeError) as error:
            raise checks.UserError(
                f'{file} is not nnU-Net\'s list of folds [{{"val": [...]}}]: {error}.'
            ) from error
        for name in held_out:
            checks.one_of(f"a validation case of {file}", name, names["train"])
    twice = set(names["train"]) & set(names["test"])
    checks.require(
        not twice,
        f"{root} has the cases {', '.join(sorted(twice)[:3])} in both labelsTr and "
        "labelsTs; rename or remove one of each.",
    )
    splits = {n: "val" if n in held_out else "train" for n in names["train"]}
    return splits | dict.fromkeys(names["test"], "test")


def _names(folder, ending):
    files = [f for f in sorted(folder.glob(f"*{ending}")) if f.name[0] != "."]
    names = [file.name.removesuffix(ending) for file in files]
    for name in names:
        require_id(f"a file of {folder}", name)
    return names
