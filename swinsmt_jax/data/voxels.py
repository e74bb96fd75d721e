"""Valid voxel values: one check for images, one for masks, one for label ids.

All input passes through them: files, arrays, and scans for exported networks.
"""

from collections.abc import Sequence

import numpy as np

from swinsmt_jax import checks

DENSE = 800  # HU
AIR = -900  # HU
TISSUE = 100  # HU, a range that noise alone has
OVERSHOOT = 0.25  # of splines beyond a mask's 0 and 1
RESIDUE = 1e-3  # that resampling leaves of nothing


def require_real(name: object, array: np.ndarray) -> None:
    """Raise `UserError` unless each voxel is one real number."""
    checks.require(
        array.dtype.kind in "iufb",
        f"{name} holds voxels of type {array.dtype}, but one real number a voxel is "
        "needed; RGB and complex images are not CTs or label maps.",
    )


def require_finite(name: object, array: np.ndarray) -> None:
    """Raise `UserError` for voxels that are NaN or infinite."""
    bad = 0
    if array.dtype.kind == "f":
        bad = int(array.size - np.isfinite(array).sum())
    checks.require(
        bad == 0,
        f"{name} has {bad} voxels that are NaN or infinite; replace them, for a CT "
        "with -1024 HU (air).",
    )


def hounsfield(name: object, array: np.ndarray) -> np.ndarray:
    """Return Hounsfield units rounded to int16.

    Raises:
        UserError: for voxels that are not finite; the message begins with `name`.
    """
    require_real(name, array)
    require_finite(name, array)
    limits = np.iinfo(np.int16)
    if array.dtype != np.int16:
        array = np.clip(np.rint(array), limits.min, limits.max).astype(np.int16)
    return np.ascontiguousarray(array)


def unlike_hounsfield(
    name: object, array: np.ndarray, modality: str
) -> tuple[str, ...]:
    """Return a note with the range of CT voxels that are unlikely Hounsfield units.

    Such voxels belong to another modality, are scaled to [0, 1] or [0, 255], or offset
    by 1024. The signs: no voxel is below or none is above water, the range is that of
    one tissue, or a fifth of the voxels are denser than everything but cortical bone.
    """
    if modality.upper() != "CT":
        return ()
    low, high = array.min(), array.max()
    empty = low == high or high <= AIR
    dense = np.count_nonzero(array > DENSE)
    body = low < 0 < high and high - low >= TISSUE and dense <= array.size / 5
    if empty or body:
        return ()
    return (
        f"{name}: its values lie from {low:g} to {high:g}, unlike Hounsfield units "
        "(air -1000, fat -100, water 0, bone up to 3000); it is not a CT, or was "
        "scaled or offset: convert it to Hounsfield units, or name its modality "
        "(docs/formats.md).",
    )


def mask(name: object, array: np.ndarray) -> tuple[np.ndarray, tuple[str, ...]]:
    """Return a mask as bool, with a note if it had to be thresholded at 0.5.

    Raises:
        UserError: for values other than 0, 1 and their resampled values.
    """
    require_finite(name, array)
    low, high = float(array.min()), float(array.max())
    checks.require(
        -OVERSHOOT <= low and high <= 1 + OVERSHOOT,
        f"{name} holds values from {low:g} to {high:g}, but a mask holds 0 and 1; is "
        "this a label map or the CT?",
    )
    checks.require(
        high >= 0.5 or high <= RESIDUE,
        f"{name} holds values from {low:g} to {high:g}, but a mask holds 0 and 1, and "
        "a resampled one at least 0.5 inside; write it again.",
    )
    inside = array >= 0.5
    if array.dtype.kind != "f" or np.array_equal(array, inside):
        return inside, ()
    note = f"{name} holds values between 0 and 1; those of at least 0.5 are inside."
    return inside, (note,)


def normalizing(
    hu_range: Sequence[float], normalization: Sequence[float]
) -> tuple[np.float32, np.float32]:
    """Return factor and summand from HU scaled to [0, 1] to the network's input.

    Args:
        hu_range, normalization: as in `config.DataConfig`.
    """
    low, high = hu_range
    mean, std = normalization or (low, high - low)
    return np.float32((high - low) / std), np.float32((low - mean) / std)


def label_ids(name: object, array: np.ndarray) -> np.ndarray:
    """Return label ids as uint8.

    Raises:
        UserError: for dtypes other than bool and integers, and values beyond 0 to 255.
    """
    array = np.asarray(array)
    checks.require(
        array.dtype.kind in "iub",
        f"{name} would hold labels of type {array.dtype}, but they must be bool or "
        "integers; round them with .astype(int).",
    )
    low, high = (int(array.min()), int(array.max())) if array.size else (0, 0)
    checks.require(
        0 <= low and high <= 255,
        f"{name} would hold labels from {low} to {high}, but they must lie in "
        "[0, 255].",
    )
    return array.astype(np.uint8)
