"""The TotalSegmentator-V2 layout.

<root>/meta.csv                          semicolon-separated; image_id, split
<root>/s0001/ct.nii.gz
<root>/s0001/segmentations/<class>.nii.gz   117 binary masks, or instead
<root>/s0001/segmentations.nii.gz           one volume of label ids
"""

from pathlib import Path

from swinsmt_jax import checks, labels
from swinsmt_jax.class_map import V2, ClassMap
from swinsmt_jax.data import meta
from swinsmt_jax.data.case import CLASS, Case, Dataset, require_files
from swinsmt_jax.runtime.files import absolute

TITLE = "TotalSegmentator-V2's, with meta.csv"
SUFFIX = ".nii.gz"


def fits(root: Path, content: dict) -> bool:
    """Take every folder without a description."""
    return not content


def read(
    root: Path, content: dict, *, where: str = "", classes: ClassMap = V2
) -> Dataset:
    """List the cases of meta.csv; raise `UserError` for a folder without it."""
    _require_meta(root)
    refused: dict[str, str] = {}
    splits = meta.read(root, refused=refused)
    return Dataset(root, classes, splits, lambda *case: case_of(root, *case), refused)


def find_cases(root: str | Path, *, split: str) -> tuple[Case, ...]:
    """List the cases of a split, in the order of meta.csv.

    Raises:
        UserError: for a missing folder, meta.csv, column, CT or segmentation, a
            repeated id or one that is not a plain folder name, and an empty split.
    """
    return read(absolute(root), {}).of_split(split)


def case_of(root: Path, name: str, split: str) -> Case:
    """Return one case; raise `UserError` if one of its files is missing.

    If a case has both the label file and the folder of masks, the file is used.
    """
    folder = root / name
    file, masks = folder / f"segmentations{SUFFIX}", folder / "segmentations"
    checks.require(
        file.exists() or masks.exists(),
        f"case {name!r} has neither {masks} with the masks nor {file.name}; finish the "
        "download or remove its line from meta.csv.",
    )
    segmentation = file if file.exists() else masks / f"{CLASS}{SUFFIX}"
    return require_files(Case(name, folder / f"ct{SUFFIX}", split, segmentation))


def _require_meta(root):
    checks.require(
        root.is_dir(),
        f"data folder {root} does not exist; download TotalSegmentator-V2 from "
        f"{labels.RECORD}, or make phantoms: python -m swinsmt_jax.phantoms "
        f"--root={root}",
    )
    checks.require(
        (root / meta.META).is_file(),
        f"{root / meta.META} does not exist, but names the split of every case; lay "
        f"the folder out as TotalSegmentator-V2 downloads ({labels.RECORD}), or "
        "describe it by a dataset.json, nnU-Net's or your own (docs/data.md).",
    )
