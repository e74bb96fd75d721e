"""Labels that a program wrote: one file of label ids, or a folder of masks."""

from pathlib import Path

import numpy as np
from absl import logging

from swinsmt_jax import checks
from swinsmt_jax.class_map import ClassMap
from swinsmt_jax.data import nifti

SUFFIXES = (".nii.gz", ".nii")


def load_prediction(path: Path, *, classes: ClassMap, like: nifti.Volume) -> np.ndarray:
    """Read label ids, uint8 `[X, Y, Z]`, on the grid of a scan.

    Args:
        path: a file of label ids, or a folder with <class>.nii.gz or <class>.nii for
            each class, as TotalSegmentator and `predict.py --masks` write it. Of masks
            that overlap the later class wins; a class without a mask is nowhere.
        classes: the names of the ids.
        like: the scan.

    Raises:
        UserError: for files that cannot be read, lie on another grid, or hold other ids
            or classes.
    """
    if not path.is_dir():
        return nifti.load_labels(path, classes=classes, on=like).array
    masks, wanted = masks_in(path), classes.names[1:]
    for name, file in masks.items():
        checks.require(
            name in wanted,
            f"{file} is a mask of none of the {len(wanted)} classes."
            f"{checks.did_you_mean(name, wanted)}",
        )
    checks.require(bool(masks), f"{path} holds no masks, such as {wanted[0]}.nii.gz.")
    missing = [name for name in wanted if name not in masks]
    if missing:
        logging.warning(
            "%s has no mask of %d classes, which count as predicted nowhere: %s%s",
            path,
            len(missing),
            ", ".join(missing[:5]),
            ", ..." if len(missing) > 5 else "",
        )
    ids = {name: i for i, name in enumerate(classes.names)}
    files = {masks[name]: ids[name] for name in wanted if name in masks}
    merged = nifti.load_masks(files, on=like)
    for note in merged.notes:
        logging.warning("%s", note)
    return merged.label


def masks_in(folder: Path) -> dict[str, Path]:
    """Return {class: file} of a folder of masks; hidden files are none."""
    return {
        file.name.removesuffix(suffix): file
        for suffix in SUFFIXES
        for file in sorted(folder.glob(f"[!.]*{suffix}"))
    }
