"""Labels from a program: one file of label ids, or a folder of masks."""

from pathlib import Path

import numpy as np
from absl import logging

from swinsmt_jax import checks
from swinsmt_jax.class_map import ClassMap, class_key
from swinsmt_jax.data import geometry, nifti, nifti_file, resampling
from swinsmt_jax.data.volume import same_grid


def load_prediction(path: Path, *, classes: ClassMap, like: nifti.Volume) -> np.ndarray:
    """Read label ids, uint8 `[X, Y, Z]`, of all voxels on the grid of a scan.

    Args:
        path: a file of label ids, or a folder with <class>.nii.gz or <class>.nii for
            each class, as written by TotalSegmentator and `predict.py --masks`. If
            masks overlap, the later class wins. A class without a mask has no voxels,
            and masks of other classes are skipped, both with a warning.
        classes: the names of the ids.
        like: the scan.

    Raises:
        UserError: for files that cannot be read, lie on another grid, or contain other
            ids or classes.
    """
    if not path.is_dir():
        nifti.require_same_grid(nifti.grid_of(path), like)
        return _told(nifti.load_labels(path, classes=classes, on=like)).array
    ids, given, wanted = classes.ids_by_key(), masks_in(path), classes.names[1:]
    names = {name: classes.names[ids.get(class_key(name), 0)] for name in given}
    masks = {own: given[name] for name, own in names.items() if own in wanted}
    foreign = [name for name, own in names.items() if own not in wanted]
    checks.require(
        bool(masks),
        f"{path} holds masks of none of the classes {', '.join(wanted)}; it holds "
        f"{', '.join(given) or 'none at all'}.",
    )
    missing = [name for name in wanted if name not in masks]
    for name in foreign:
        near = checks.did_you_mean(name, missing)
        checks.require(
            not near,
            f"{given[name]} is a mask of none of the {len(wanted)} classes.{near}",
        )
    if foreign:
        logging.warning(
            "%s holds %d masks of none of the classes, which are skipped: %s",
            path,
            len(foreign),
            checks.few(foreign),
        )
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
    for file in files:
        nifti.require_same_grid(nifti.grid_of(file), like)
    return _told(nifti.load_masks(files, on=like)).label


def load_regridded(
    path: Path, *, classes: ClassMap, like: nifti.Volume
) -> tuple[np.ndarray, str]:
    """Read label ids as `load_prediction`, from any grid, on a scan's grid.

    Each voxel of the scan gets the nearest label; outside the labels' grid it is
    background.

    Returns:
        The labels, and how their own grid differed from the scan's; "" if it did not.
    """
    files = list(masks_in(path).values()) if path.is_dir() else [path]
    checks.require(bool(files), f"{path} holds no masks.")
    own = nifti.grid_of(files[0])
    label = load_prediction(path, classes=classes, like=own)
    if same_grid(own, like):
        return label, ""
    note = geometry.difference(label.shape, own.affine, like.array.shape, like.affine)
    step = np.linalg.inv(own.affine) @ like.affine
    return resampling.nearest(label, step, like.array.shape), note


def masks_in(folder: Path) -> dict[str, Path]:
    """Return {class: file} of a folder of masks; hidden files do not count."""
    return {nifti_file.stem(file): file for file in nifti_file.files_in(folder)}


def _told(found):
    for note in found.notes:
        logging.warning("%s", note)
    return found
