"""nnU-Net's layout: dataset.json, imagesTr, labelsTr, and imagesTs, labelsTs.

Images are named <case>_0000.nii.gz (version 2), or <case>.nii.gz as in the Medical
Segmentation Decathlon (version 1). The first fold of splits_final.json gives training
and validation cases. Without that file, every fifth case in the order of names is for
validation. Test cases are the cases of imagesTs with labels in labelsTs. A training
case that lacks its image or its labels is refused. Voxels with the label "ignore" are
not annotated.
"""

from pathlib import Path
from typing import Any

from swinsmt_jax import checks, class_map
from swinsmt_jax.data import itk_file, meta
from swinsmt_jax.data.case import Case, Dataset, require_files
from swinsmt_jax.runtime.files import read_json

TITLE = "nnU-Net's, with imagesTr and labelsTr"
CHANNEL = "_0000"  # of the only one
FOLDERS = {"train": ("imagesTr", "labelsTr"), "test": ("imagesTs", "labelsTs")}
SPLITS_FILE = "splits_final.json"
HOLD_OUT_EVERY = 5  # training cases, one of which is for validation
NORMALISATIONS = ("nonorm", "zscore", "rescale_to_0_1")  # name no modality
ENDINGS = (".nii.gz", ".nii", *itk_file.SUFFIXES)


def fits(root: Path, content: dict) -> bool:
    """Whether a JSON object is nnU-Net's description of a dataset."""
    of_a_description = isinstance(content.get("modality", ""), str)
    return "labels" in content and ("channel_names" in content or not of_a_description)


def read(root: Path, content: dict, *, where: str) -> Dataset:
    """List the cases.

    Raises:
        UserError: for several channels, regions, ids with gaps, files that are not
            NIfTI, and a folder without labels.
    """
    classes, ignored = _classes(content["labels"], where)
    channels: Any = content.get("channel_names", content.get("modality"))
    checks.require(
        isinstance(channels, dict | list) and len(channels) == 1,
        f"{where} has the channels {channels}, but one, the CT, is needed.",
    )
    (channel,) = channels.values() if isinstance(channels, dict) else channels
    _require_ct(channel, where)
    ending = content.get("file_ending", ENDINGS[0])
    checks.one_of(f"{where}: file_ending", ending, ENDINGS)

    def find(name, split):
        images, segmentations = FOLDERS["test" if split == "test" else "train"]
        new = root / images / f"{name}{CHANNEL}{ending}"
        old = root / images / f"{name}{ending}"
        image = old if old.is_file() and not new.is_file() else new
        label = root / segmentations / f"{name}{ending}"
        return require_files(Case(name, image, split, label, ignored=ignored))

    refused: dict[str, str] = {}
    folds = _folds(root / SPLITS_FILE, _names(root, "train", ending))
    splits = _splits(root, ending, folds, refused)
    return Dataset(root, classes, splits, find, refused, folds)


def _require_ct(channel, where):
    checks.require(
        "ct" in str(channel).lower() or str(channel).lower() in NORMALISATIONS,
        f"{where} has the channel {channel!r}, but a CT in Hounsfield units is needed; "
        "if it is one, call it CT; otherwise describe the dataset by a JSON file with "
        "its 'modality'.",
    )


def _classes(found, where):
    checks.require(
        isinstance(found, dict) and len(found) > 1,
        f"{where}: labels is {found!r}, but must be {{name: id}}.",
    )
    names = all(isinstance(name, str) for name in found.values())
    if names and all(key.isdecimal() for key in found):  # version 1: {id: name}
        found = {name: int(number) for number, name in found.items()}
    checks.require(
        all(type(number) is int for number in found.values()),
        f"{where}: labels are {found}, but each must be one number; regions made of "
        "several labels are not supported: name the labels themselves.",
    )
    ignored = found.get("ignore")
    found = {name: number for name, number in found.items() if name != "ignore"}
    names = sorted(found, key=found.get)
    checks.require(
        sorted(found.values()) == list(range(len(found))),
        f"{where}: labels have the ids {sorted(found.values())}, but must be 0 for the "
        f"background and then 1, 2, ..., {len(found) - 1}.",
    )
    checks.require(
        ignored is None or ignored >= len(found),
        f"{where}: the label 'ignore' is {ignored}, but must be above all others.",
    )
    return class_map.make(names[1:], {}, where=where), ignored


def _splits(root, ending, folds, refused):
    """Return {case: split} of the training cases, and the test cases with labels."""
    parts = {split: _names(root, split, ending) for split in FOLDERS}
    checks.require(
        any((root / FOLDERS["train"][1]).glob(f"*{ending}")),
        f"{root / FOLDERS['train'][1]} holds no *{ending}, but nnU-Net's layout has "
        "the labels of the training cases there.",
    )
    splits = _fold(root / SPLITS_FILE, folds, parts["train"], refused)
    for name in set(parts["train"]) & set(parts["test"]):
        refused[name] = (
            f"{root} has the case {name!r} in both its training and its test folders; "
            "rename or remove one."
        )
    splits |= dict.fromkeys(parts["test"], "test")
    entries = ((name, name, split) for name, split in splits.items())
    return meta.collect(entries, refused=refused)


def _folds(file, cases):
    """Return the folds of a cross-validation from a file; () without it."""
    if not file.is_file():
        return ()
    try:
        folds = []
        for fold in read_json(file):
            val = [str(name) for name in fold["val"]]
            train = fold.get("train", [name for name in cases if name not in val])
            folds.append({"train": [str(name) for name in train], "val": val})
        folds[0]  # noqa: B018 - IndexError if empty
        return folds
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise checks.UserError(
            f'{file} is not nnU-Net\'s list of folds [{{"train": [...], "val": [...]}}]'
            f": {checks.one_line(error)}."
        ) from error


def _fold(file, folds, cases, refused):
    """Return {case: split} of the first fold, or with every fifth case for validation.

    Cases in neither list of the fold are not used.
    """
    if not folds:
        held_out = cases[HOLD_OUT_EVERY - 1 :: HOLD_OUT_EVERY]
        return {name: "val" if name in held_out else "train" for name in cases}
    train, val = folds[0]["train"], folds[0]["val"]
    for title, names in (("training", train), ("validation", val)):
        for name in set(names) - set(cases) - refused.keys():
            refused[name] = (
                f"{name!r} is a {title} case of {file}, but has neither image nor "
                f"labels.{checks.did_you_mean(name, cases)}"
            )
    for name in set(train) & set(val):
        refused[name] = (
            f"{name!r} is both a training and a validation case of {file}; remove it "
            "from one of them."
        )
    splits = dict.fromkeys(train, "train") | dict.fromkeys(val, "val")
    return {name: splits[name] for name in cases if name in splits}


def _names(root, split, ending):
    """Return the cases of a split in the order of their names."""
    images, labels = (
        {
            file.name.removesuffix(ending)
            for file in (root / folder).glob(f"[!.]*{ending}")
        }
        for folder in FOLDERS[split]
    )
    if split == "test":
        return sorted(labels)
    # A training case without labels shall not vanish.
    return sorted(labels | {name.removesuffix(CHANNEL) for name in images - labels})
