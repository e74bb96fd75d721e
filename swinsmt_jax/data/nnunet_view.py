"""A scan as nnU-Net's networks see it: axes, crop, normalisation and resampling.

This follows the inference of nnU-Net 2.8.1, and the tests compare both.
"""

import functools
from collections.abc import Sequence

import numpy as np
from nibabel import orientations
from scipy import ndimage

from swinsmt_jax.data.network_view import NetworkView
from swinsmt_jax.data.nnunet_plan import Normalization, Plan

ANISOTROPIC = 3  # ratio of spacings beyond which slices are resampled apart


def nnunet_view(
    image: np.ndarray,
    *,
    spacing: Sequence[float],
    source_affine: np.ndarray,
    plan: Plan,
) -> NetworkView:
    """Transpose, crop to non-zero voxels, normalise and resample a scan.

    Args:
        image: [X, Y, Z] in RAS orientation.
        spacing: voxel sides in mm of these axes.
        source_affine: [4, 4] of the file; some models take its axes as they are.
        plan: of the model.
    """
    axes = network_axes(source_affine, plan)
    order = np.argsort(axes[:, 0])
    sides = np.asarray(spacing, np.float64)[order]
    array = orientations.apply_orientation(image, axes)
    filled = array != 0
    found = ndimage.find_objects(filled.view(np.uint8))
    box = found[0] if found else tuple(slice(0, n) for n in array.shape)
    masked = None
    if plan.normalization.masked:
        masked = ndimage.binary_fill_holes(filled)[box]
    crop = normalized(array[box], plan.normalization, mask=masked)
    target = np.array(plan.spacing)
    shape = tuple(
        round(n * old / new)
        for n, old, new in zip(crop.shape, sides, target, strict=True)
    )
    positions = None
    if shape != crop.shape:
        apart = separate_axis(sides, target, forced=plan.separate)
        back = separate_axis(target, sides, forced=plan.separate_back)
        positions = tuple(
            _centres(n, new, nearest=axis == back)
            for axis, (n, new) in enumerate(zip(crop.shape, shape, strict=True))
        )
        crop = resized(crop, shape, order=plan.order, apart=apart)
    return NetworkView(crop[..., None], array.shape, box, positions, axes=axes)


def network_axes(source_affine: np.ndarray, plan: Plan) -> np.ndarray:
    """Return the orientation [3, 2] from RAS to the network's axes, as in nibabel."""
    axes = np.array([[0, 1], [1, 1], [2, 1]], np.float64)
    if not plan.reoriented:
        to_ras = orientations.io_orientation(source_affine)
        axes = orientations.ornt_transform(axes, to_ras)
    reverse = 2 - axes[:, 0].astype(int)  # [z, y, x] of the array that is read
    axes[:, 0] = [plan.transpose.index(axis) for axis in reverse]
    return axes


def normalized(
    image: np.ndarray, rule: Normalization, *, mask: np.ndarray | None = None
) -> np.ndarray:
    """Return normalised voxels, float32; z-scores come from the mask, if any."""
    image = image.astype(np.float32)
    if rule.scheme == "CTNormalization":
        np.clip(image, rule.low, rule.high, out=image)
        image -= rule.mean
        image /= rule.std
        return image
    where = ... if mask is None else mask
    part = image[where]
    image[where] = (part - part.mean()) / max(part.std(), 1e-8)
    return image


def separate_axis(
    current: np.ndarray, target: np.ndarray, *, forced: bool | None
) -> int | None:
    """Return the axis whose slices are resampled separately, or None.

    It is the coarsest axis of the first anisotropic spacing of the two. If several axes
    share the largest spacing, the result is None.
    """
    spacings = {None: (current, target), True: (current,), False: ()}[forced]
    for sides in spacings:
        if forced or sides.max() / sides.min() > ANISOTROPIC:
            coarsest = np.flatnonzero(sides == sides.max())
            return int(coarsest[0]) if len(coarsest) == 1 else None
    return None


def resized(
    volume: np.ndarray, shape: Sequence[int], *, order: int, apart: int | None
) -> np.ndarray:
    """Interpolate by splines between voxel centres, clipped to the volume's range.

    Edges repeat beyond the volume. Along the axis `apart` the nearest slice is used,
    and each slice keeps its own range.

    Args:
        volume: float32 [D, H, W].
        shape: of the result.
        order: of the spline.
        apart: axis, or None.
    """
    within = tuple(axis for axis in range(3) if axis != apart)
    low, high = (f(axis=within, keepdims=True) for f in (volume.min, volume.max))
    if apart is not None:
        nearest = _nearest(volume.shape[apart], shape[apart])
        volume, low, high = (a.take(nearest, apart) for a in (volume, low, high))
    growth = {a: shape[a] / volume.shape[a] for a in within}
    for axis in sorted(within, key=growth.__getitem__):  # what shrinks most comes first
        if growth[axis] != 1:
            matrix = _spline(volume.shape[axis], shape[axis], order)
            volume = np.moveaxis(np.tensordot(matrix, volume, (1, axis)), 0, axis)
    return np.clip(np.ascontiguousarray(volume), low, high)


@functools.lru_cache(maxsize=8)
def _spline(old, new, order):
    """Return the matrix float32 [new, old] of a spline along one axis."""
    if old == 1:
        return np.ones((new, 1), np.float32)
    units = np.eye(old)
    zoom = functools.partial(ndimage.zoom, order=order, mode="nearest", grid_mode=True)
    return np.stack([zoom(u, new / old) for u in units], axis=1).astype(np.float32)


def _nearest(old, new):
    return np.minimum(((np.arange(new) + 0.5) * (old / new)).astype(int), old - 1)


def _centres(n, size, *, nearest):
    """Return the positions of n voxels of the scan among `size` of the network."""
    if nearest:
        return _nearest(size, n).astype(np.float64)
    return np.clip((np.arange(n) + 0.5) * (size / n) - 0.5, 0, size - 1)
