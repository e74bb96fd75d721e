"""NIfTI volumes in RAS orientation: load and save. Owns the affine."""

import functools
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import nibabel as nib
import numpy as np
from absl import logging
from nibabel import orientations

from swinsmt_jax import checks, labels
from swinsmt_jax.class_map import V2, ClassMap
from swinsmt_jax.data import geometry, itk_file, label_table, nifti_file, voxels
from swinsmt_jax.data.resampling import fill_most
from swinsmt_jax.data.volume import (
    Volume,
    in_file_axes,
    ras_grid,
    require_same_grid,
)
from swinsmt_jax.runtime.files import absolute, replacing, writable

WRITTEN = (".nii", ".nii.gz", ".nrrd", ".mha")
OVERLAPS = ("order", "smaller")  # who wins where masks overlap
ROUNDING = 1e-3  # of label ids that a file stores with a slope


def load_ct(path: str | Path, *, modality: str = "CT", whole: bool = True) -> Volume:
    """Read a CT as int16 Hounsfield units, rounded, in RAS orientation.

    If `whole` is false, voxels stay as they are, in float32 unless they are integers of
    at most 16 bits. Doubtful points of the file are noted and logged, such as values
    unlike HU in a CT.

    Raises:
        UserError: for a file that is missing, truncated, not NIfTI, not 3-D, with RGB,
            complex, NaN or infinite voxels, or without a usable affine.
    """
    volume = _load(path)
    return _as_ct(volume, *volume.notes, *_doubts(volume, modality), whole=whole)


def from_array(
    hu: np.ndarray,
    affine: np.ndarray,
    *,
    path: Path | None = None,
    modality: str = "CT",
    whole: bool = True,
) -> Volume:
    """Return a CT from memory as `load_ct` does from a file, with the same errors.

    `path` is its DICOM series, whose tags state a CT in HU; messages name it.
    """
    name = path or Path("the array")
    try:
        hu, affine = np.asarray(hu), np.asarray(affine, np.float64)
    except (TypeError, ValueError) as error:
        raise checks.UserError(
            f"{name} or its affine cannot be read as numbers: {checks.one_line(error)}."
        ) from error
    hu = hu.reshape(nifti_file.without_last_ones(hu.shape))
    volume = _checked(name, hu, affine)
    sheared = geometry.sheared_note(volume.path, volume.source_affine)
    doubts = () if path else _doubts(volume, modality)
    return _as_ct(volume, *sheared, *doubts, whole=whole)


def grid_of(path: str | Path) -> Volume:
    """Return a volume from a NIfTI header; its voxels are 0 and take no memory."""
    return _open(path)[0]


def noted(volume: Volume, *notes: str) -> Volume:
    """Return a scan with more notes, and log each of them once in a process."""
    for note in notes:
        _log(note)
    return replace(volume, notes=(*volume.notes, *notes))


@functools.lru_cache(maxsize=4096)
def _log(note: str) -> None:
    logging.warning("%s", note)


def _as_ct(volume: Volume, *notes: str, whole: bool) -> Volume:
    if whole:
        array = voxels.hounsfield(volume.path, volume.array)
    else:
        voxels.require_finite(volume.path, volume.array)
        short = volume.array.dtype.kind in "iu" and volume.array.dtype.itemsize <= 2
        array = np.ascontiguousarray(volume.array, None if short else np.float32)
    return noted(replace(volume, array=array, notes=()), *notes)


def _doubts(volume: Volume, modality: str) -> tuple[str, ...]:
    voxels.require_finite(volume.path, volume.array)
    return voxels.unlike_hounsfield(volume.path, volume.array, modality)


def load_labels(
    path: str | Path,
    *,
    classes: ClassMap = V2,
    on: Volume | None = None,
    ignored: int | None = None,
) -> Volume:
    """Read a multi-label segmentation as uint8 label ids in RAS orientation.

    Voxels with the value `ignored` become `IGNORED`. If the header names the ids, they
    become those of the classes with these names. A map that was cut to a box of `on` is
    put in place, with a note; there are no other notes.

    Raises:
        UserError: as `load_ct`, and for values that are not label ids of the classes,
            or have names in the header that no class has. With `on`, as
            `require_same_grid`, before voxels are read.
    """
    volume = _load_on(path, on)
    voxels.require_finite(volume.path, volume.array)
    array, last = volume.array, classes.num_classes - 1
    if array.dtype.kind == "f":
        array = np.rint(array)
        checks.require(
            bool(np.abs(array - volume.array).max() <= ROUNDING),
            f"{path} holds values that are not whole numbers, but a segmentation holds "
            f"label ids from 0 to {last}; is this the CT?",
        )
    if volume.header is not None:
        array = label_table.ids_by_name(path, array, volume.header, classes)
    unknown = np.False_ if ignored is None else array == ignored
    array = np.where(unknown, 0, array) if unknown.any() else array
    low, high = array.min(), array.max()
    checks.require(
        low >= 0 and high <= last,
        f"{path} holds values from {low:g} to {high:g}, but the class map "
        + (
            f"{labels.VERSION} has label ids from 0 to {last}; segmentations of other "
            f"TotalSegmentator versions must be mapped to it ({labels.RECORD})."
            if classes == V2
            else f"of the dataset has label ids from 0 to {last}."
        ),
    )
    array = np.ascontiguousarray(array.astype(np.uint8))
    if unknown.any():
        array[unknown] = labels.IGNORED
    return replace(volume, array=array)


def load_mask(path: str | Path, *, on: Volume | None = None) -> Volume:
    """Read one structure's mask as bool in RAS orientation; see `voxels.mask`.

    It is put on the grid of `on`, with a note, as in `load_labels`.

    Raises:
        UserError: as `load_ct` and `voxels.mask`. With `on`, as `require_same_grid`,
            before voxels are read.
    """
    volume = _load_on(path, on)
    array, notes = voxels.mask(volume.path, volume.array)
    return replace(volume, array=array, notes=volume.notes + notes)


class Merged(NamedTuple):
    """Masks as one label map.

    Attributes:
        label: uint8 [X, Y, Z].
        claimed: how often a mask claims a labelled voxel.
        notes: facts that a user should know about the files.
        voxels: {label id: voxels of its mask}.
    """

    label: np.ndarray
    claimed: int
    notes: tuple[str, ...]
    voxels: dict[int, int]


def load_masks(
    values: Mapping[Path, int] | Mapping[str, int],
    *,
    on: Volume,
    overlaps: str = "order",
) -> Merged:
    """Merge masks.

    Args:
        values: {file: label id of its voxels}, at most 255.
        on: volume whose grid the masks must share.
        overlaps: one of `OVERLAPS`: the later mask wins, or the mask with fewer voxels,
            then the later one.
    """
    label, claimed, notes = None, 0, tuple[str, ...]()
    found: dict[int, int] = {}
    ids, sizes = np.zeros(256, np.uint8), np.zeros(256, np.int64)  # by number of mask
    masks: list[tuple[Path | str, int]] = [*values.items()]
    for number, (file, value) in enumerate(masks, start=1):
        volume = load_mask(file, on=on)
        mask, notes = volume.array, notes + volume.notes
        if label is None:
            label = np.zeros_like(mask, np.uint8)
        # Indexing runs along the last axis, and is ten times as fast where that lies
        # densely in memory. In a NIfTI file it is the first axis that does.
        order = np.argsort(np.abs(mask.strides))[::-1]
        dense, inside = label.transpose(order), mask.transpose(order)
        before = dense[inside]
        claimed += int(np.count_nonzero(ids[before]))
        found[value] = before.size
        ids[number], sizes[number] = value, before.size
        smaller = (before > 0) & (sizes[before] < before.size)
        keep = smaller if overlaps == "smaller" else False
        dense[inside] = np.where(keep, before, np.uint8(number))
    assert label is not None
    return Merged(ids[np.ascontiguousarray(label)], claimed, notes, found)


def save_labels(
    path: str | Path, array: np.ndarray, *, like: Volume, description: str = ""
) -> None:
    """Write label ids [X, Y, Z] on the grid of `like` in the orientation of its file.

    If `like` was resampled, each voxel of the file gets the id that fills most of it.
    The file appears under its name only when complete.
    """
    checks.require(
        array.shape == like.array.shape,
        f"labels for {path} have shape {array.shape}, but the volume of {like.path} "
        f"has {like.array.shape}.",
    )
    array = voxels.label_ids(path, array)
    affine, shape = ras_grid(like.source_affine, like.source_shape)
    if not np.allclose(like.affine, affine):
        to_grid = np.linalg.inv(like.affine) @ affine
        steps, first = np.diag(to_grid)[:3].tolist(), to_grid[:3, 3].tolist()
        array = fill_most(array, steps, first, shape)
    save(path, array, like=like, description=description)


def save(
    path: str | Path,
    array: np.ndarray,
    *,
    like: Volume,
    description: str = "",
    slope: float = 1.0,
) -> None:
    """Write an array [X, Y, Z] on a file's RAS grid in that file's orientation.

    The file appears under its name only when complete. `description` becomes a header
    extension, such as `label_table.xml`; readers multiply by `slope`.
    """
    write(
        path,
        in_file_axes(array, like),
        like.source_affine,
        header=like.header,
        description=description,
        slope=slope,
    )


def write(
    path: str | Path,
    array: np.ndarray,
    affine: np.ndarray,
    *,
    header: nib.Nifti1Header | None = None,
    description: str = "",
    slope: float = 1.0,
) -> None:
    """Write an array as NIfTI, NRRD or MetaImage; it appears when complete.

    `affine`, in mm, or the `header` of another file gives its place.

    Raises:
        UserError: for another suffix than .nii, .nii.gz, .nrrd and .mha, and for a
            failed write.
    """
    path = absolute(path)
    checks.require(
        path.name.lower().endswith(WRITTEN),
        f"{path} cannot be written: the name ends with .nii, .nii.gz, .nrrd or .mha.",
    )
    with writable(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as partial:
            _write(partial, array, affine, header, description, slope)


def _write(path, array, affine, header, description, slope):
    if itk_file.is_itk(path):
        itk_file.write(path, array, affine, table=description)
        return
    header = geometry.header_like(header, affine, array.shape)
    header.set_data_dtype(array.dtype)
    image = nib.Nifti1Image(np.ascontiguousarray(array), None, header)
    if slope != 1:
        image.header.set_slope_inter(slope, 0)
    if description:
        extension = nib.nifti1.Nifti1Extension(0, description.encode())
        image.header.extensions.append(extension)
    nib.save(image, path)


def _load(path: str | Path) -> Volume:
    return _read(*_open(path))


def _load_on(path: str | Path, on: Volume | None) -> Volume:
    """Read a volume that belongs to a scan, on the grid of `on` if given."""
    grid, image = _open(path)
    box = require_same_grid(grid, on, cut=True) if on else ()
    volume = replace(_read(grid, image), notes=())
    if on is None or volume.array.shape == on.array.shape:
        return volume
    array = np.zeros(on.array.shape, volume.array.dtype)
    array[box] = volume.array
    note = (
        f"{grid.path} has {volume.array.shape} of the {on.array.shape} voxels of "
        f"{on.path}: it was cut, and what lies outside is taken for background."
    )
    return replace(volume, array=array, affine=on.affine, notes=(note,))


def _read(grid: Volume, image: nib.Nifti1Pair) -> Volume:
    with nifti_file.named(grid.path):
        nifti_file.require_room(grid.path, image)
        array = nifti_file.voxels(image).reshape(grid.source_shape)
    volume = _checked(grid.path, array, grid.source_affine)
    return replace(volume, notes=grid.notes, header=grid.header)


def _open(path: str | Path) -> tuple[Volume, nib.Nifti1Pair]:
    """Check a header; the volume's zeros take no memory."""
    path = absolute(path)
    checks.require(path.is_file(), f"{path} does not exist; expected a NIfTI file.")
    with nifti_file.named(path):
        image = (itk_file if itk_file.is_itk(path) else nifti_file).opened(path)
        if not isinstance(image, nib.Nifti1Pair):
            raise nib.filebasedimages.ImageFileError(f"but {type(image).__name__}")
        nifti_file.require_possible(path, image)
        shape = nifti_file.without_last_ones(image.shape)
        zeros = np.broadcast_to(np.zeros((), nifti_file.proxy(image).dtype), shape)
        notes = geometry.notes(path, image, shape)
        volume = _checked(path, zeros, geometry.affine_in_mm(image))
        return replace(volume, notes=notes, header=image.header), image


def _checked(path, array, affine) -> Volume:
    """Bring a scalar volume with a usable affine to RAS orientation."""
    voxels.require_real(path, array)
    checks.require(
        array.ndim == 3 and array.size > 0,
        f"{path} has shape {array.shape}, but must be 3-D with no empty axis; take one "
        "volume out of a series, for example with nibabel's img.slicer[..., 0].",
    )
    checks.require(
        affine.shape == (4, 4),
        f"the affine of {path} has shape {affine.shape}, but must be [4, 4].",
    )
    checks.require(
        bool(np.isfinite(affine).all()) and abs(np.linalg.det(affine[:3, :3])) > 1e-9,
        f"{path} has the affine {affine[:3].tolist()}, which cannot be inverted, so "
        "orientation and spacing are unknown; fix its sform and qform.",
    )
    in_ras = orientations.apply_orientation(array, orientations.io_orientation(affine))
    ras, _ = ras_grid(affine, array.shape)
    return Volume(in_ras, ras, affine, array.shape, path)
