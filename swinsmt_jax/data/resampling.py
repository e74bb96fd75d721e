"""Scans and label ids on another grid."""

import math
from collections.abc import Sequence

import numpy as np
from scipy import ndimage, sparse

from swinsmt_jax import checks
from swinsmt_jax.data import nifti_file
from swinsmt_jax.data.sample import voxel_step
from swinsmt_jax.data.spacing import Sides, text
from swinsmt_jax.runtime import host_memory

MAX_EXTENT = 5000  # mm; a body with raised arms has 2,500
TIE = 1e-5  # shares of a voxel that differ by less are equal
BESIDE = np.ones((3, 3, 3))  # voxels that share a face, an edge or a corner
ROUNDING = 1e-6  # of an axis' length: headers hold spacings in float32


def covering_grid(
    shape: Sequence[int], affine: np.ndarray, *, spacing: Sides
) -> tuple[tuple[int, ...], np.ndarray]:
    """Return shape and affine of a grid of equal voxels that covers another grid.

    The new grid has the other's axes and begins at its outer edge, half a voxel before
    the centre of its first voxel. It ends at the other's last outer edge, or less than
    one new voxel behind it. So each voxel centre of the other grid lies in a new voxel.
    A grid that already has voxels with these sides covers itself.

    Args:
        shape: of the other grid.
        affine: [4, 4] of the other grid.
        spacing: side of the voxels in mm, or three sides.
    """
    ratio = np.asarray(spacing) / np.linalg.norm(affine[:3, :3], axis=0)
    if np.allclose(ratio, 1.0, atol=1e-4):
        return tuple(shape), affine
    new = np.ceil(np.array(shape) / ratio * (1 - ROUNDING)).astype(int)
    return tuple(new.tolist()), affine @ voxel_step(0.5 * ratio - 0.5, ratio)


def resample(
    array: np.ndarray,
    affine: np.ndarray,
    *,
    spacing: Sides,
    order: int,
    rule: str = "most",
) -> tuple[np.ndarray, np.ndarray]:
    """Resample to the `covering_grid` of voxels of `spacing` mm.

    A voxel that reaches beyond the end is filled from its part within.

    Args:
        array: [X, Y, Z].
        affine: [4, 4] of the array.
        spacing: side of the voxels in mm, or three sides.
        order: 0 for label ids; 1 for linear interpolation (CT), after smoothing with a
            standard deviation of half a voxel's growth.
        rule: for label ids, one of `LABEL_RULES`.

    Returns:
        The new array and its affine.

    Raises:
        UserError: for a new shape of absurd size.
    """
    shape, new_affine = covering_grid(array.shape, affine, spacing=spacing)
    if new_affine is affine:
        return array, affine
    sides = np.linalg.norm(affine[:3, :3], axis=0)
    checks.require(
        nifti_file.is_possible(shape),
        f"a scan of {array.shape} voxels of {' x '.join(f'{s:g}' for s in sides)} mm "
        f"would have {shape} at {text(spacing)} mm, but may have at most "
        f"{nifti_file.MAX_VOXELS}, and {nifti_file.MAX_SIDE} along an axis; fix the "
        "spacing in its header, or leave the scan out.",
    )
    extent = sides * array.shape
    checks.require(
        bool(extent.max() <= MAX_EXTENT),
        f"a scan of {array.shape} voxels measures "
        f"{' x '.join(f'{s:,.0f}' for s in extent)} mm by its affine, but a body has "
        f"at most {MAX_EXTENT:,} along an axis; fix the spacing in its header.",
    )
    size = 4 if order else array.itemsize  # interpolated in float32
    host_memory.require(f"a scan of {shape} voxels", math.prod(shape) * size)
    ratio = np.asarray(spacing) / sides
    offset = 0.5 * ratio - 0.5  # the centre of the new voxel 0 on the old grid
    if order == 0:
        return LABEL_RULES[rule](array, ratio, offset, shape), new_affine
    if (ratio > 1).any():  # what the new grid cannot show must not alias
        sigma = np.maximum(0, (ratio - 1) / 2)
        smooth = ndimage.gaussian_filter(
            array.astype(np.float32), sigma, mode="nearest"
        )
        whole = np.issubdtype(array.dtype, np.integer)
        array = np.rint(smooth).astype(array.dtype) if whole else smooth
    resampled = ndimage.affine_transform(
        array, ratio, offset, shape, order=order, mode="nearest"
    )
    return resampled, new_affine


def nearest(array: np.ndarray, step: np.ndarray, shape: Sequence[int]) -> np.ndarray:
    """Return the nearest label id for each voxel of another grid; 0 outside.

    Args:
        array: label ids [X, Y, Z].
        step: [4, 4], from indices of the other grid to indices of the array.
        shape: of the other grid.
    """
    offset = step[:3, 3] + TIE  # between two voxels, always the same one
    return ndimage.affine_transform(
        array, step[:3, :3], offset, tuple(shape), order=0, mode="grid-constant"
    )


def positions(
    shape: tuple[int, ...], affine: np.ndarray, *, on: np.ndarray
) -> tuple[np.ndarray, ...]:
    """Return the positions of one grid's voxels on another grid with the same axes.

    Args:
        shape: of the grid.
        affine: [4, 4] of the grid.
        on: affine [4, 4] of the other grid.

    Returns:
        The positions for each axis, in voxels of the other grid, float64.
    """
    step = np.linalg.inv(on) @ affine
    return tuple(step[a, a] * np.arange(n) + step[a, 3] for a, n in enumerate(shape))


def fill_most(
    array: np.ndarray,
    step: Sequence[float],
    offset: Sequence[float],
    shape: Sequence[int],
) -> np.ndarray:
    """Return the label id that fills most of each voxel of another grid.

    Step and offset as in `ndimage.affine_transform`. Ties, for example at every second
    face when voxels double, alternate like a checkerboard, so borders do not shift.
    """
    found, best = np.zeros(shape, array.dtype), np.zeros(shape, np.float32)
    background = np.ones(shape, np.float32)
    signs = [(1 - np.arange(n) % 2 * 2).astype(np.float32) for n in shape]
    margin = TIE * np.einsum("i,j,k->ijk", *signs)
    for number, place, share in _by_class(_overlaps, array, step, offset, shape):
        background[place] -= share
        wins = share > best[place] + margin[place]
        found[place][wins], best[place][wins] = number, share[wins]
    found[background > best + margin] = 0
    return found


def fill_nearest(
    array: np.ndarray,
    step: Sequence[float],
    offset: Sequence[float],
    shape: Sequence[int],
) -> np.ndarray:
    """Return the label id at the centre of each voxel of another grid.

    Arguments as in `fill_most`.
    """
    grids = zip(array.shape, shape, step, offset, strict=True)
    for axis, (n, new, width, first) in enumerate(grids):
        array = array.take(_at_centre(np.arange(new) * width + first, n), axis)
    return array


def fill_linear(
    array: np.ndarray,
    step: Sequence[float],
    offset: Sequence[float],
    shape: Sequence[int],
) -> np.ndarray:
    """Return the label id with the largest share at each voxel of another grid.

    Each id's mask, including the background's, is interpolated linearly between voxel
    centres. In a tie, the id of the nearest voxel wins (of two, the one further along),
    or else the smallest. This is nnU-Net's rule for training labels (batchgenerators
    0.25.5). Arguments as in `fill_most`.
    """
    nearest = fill_nearest(array, step, offset, shape)
    best, background = np.zeros(shape, np.float32), np.ones(shape, np.float32)
    for _, place, share in _by_class(_linear, array, step, offset, shape):
        background[place] -= share
        np.maximum(best[place], share, out=best[place])
    best = np.maximum(best, background) - np.float32(TIE)
    found = np.zeros(shape, array.dtype)
    taken = background >= best
    for number, place, share in _by_class(_linear, array, step, offset, shape):
        largest = share >= best[place]
        wins = largest & (~taken[place] | (nearest[place] == number))
        found[place][wins], taken[place][wins] = number, True
    found[(background >= best) & (nearest == 0)] = 0
    return found


def _linear(n, new, step, offset):
    """Return each old voxel's share [new, n] in a linear interpolation."""
    place = np.clip(np.arange(new) * step + offset, 0, n - 1)
    low = np.minimum(place.astype(int), max(n - 2, 0))
    part, rows = place - low, np.arange(new)
    beside = np.minimum(low + 1, n - 1)
    shares = np.concatenate([1 - part, part]).astype(np.float32)
    at = np.concatenate([rows, rows]), np.concatenate([low, beside])
    found = sparse.csr_array((shares, at), shape=(new, n))
    found.eliminate_zeros()
    return found


def keep_thin(
    array: np.ndarray,
    step: Sequence[float],
    offset: Sequence[float],
    shape: Sequence[int],
) -> np.ndarray:
    """As `fill_most`, but keep thin parts of classes, in whole voxels.

    If that loses or breaks a part of a structure, each new voxel that contains the
    centre of one of its old voxels gets its id, so lines stay connected. This does not
    apply where the structure is at least two new voxels thick. If several structures
    claim a voxel, the one with the fewest claims gets it. Arguments as in `fill_most`.
    """
    found = fill_most(array, step, offset, shape)
    missed = []
    for number, place, touched in _by_class(_centres, array, step, offset, shape):
        lost = _thin(touched > 0, found[place] == number)
        missed.append((np.count_nonzero(lost), number, place, lost))
    for _, number, place, lost in sorted(missed, key=lambda m: m[:2], reverse=True):
        found[place][lost] = number
    return found


def _thin(touched, kept):
    """Return the touched voxels that restore lost or broken parts."""
    parts, count = ndimage.label(touched | kept, BESIDE)
    pieces, number = ndimage.label(kept, BESIDE)
    part_of = ndimage.maximum(parts, pieces, range(1, number + 1))
    broken = np.bincount(np.array(part_of, int), minlength=count + 1) != 1
    broken[parts[touched & ~ndimage.binary_dilation(kept, BESIDE)]] = True
    broken[0] = False
    thick = ndimage.binary_opening(kept, np.ones((2, 2, 2)))
    thin = touched & broken[parts] & ~ndimage.binary_dilation(thick, BESIDE)
    return touched & ndimage.binary_dilation(thin, BESIDE)


LABEL_RULES = {
    "most": fill_most,
    "nearest": fill_nearest,
    "keep_thin": keep_thin,
    "linear": fill_linear,
}


def _by_class(weights, array, step, offset, shape):
    """Yield (id, box in the new grid, sums of weights in it) for each label id.

    `weights` gives the old voxels' weights [new, n] for each new one along an axis.
    """
    grids = zip(array.shape, shape, step, offset, strict=True)
    by_axis = [weights(*grid) for grid in grids]
    for number, box in enumerate(ndimage.find_objects(array), start=1):
        if box is None:
            continue
        parts = [axis[:, side] for axis, side in zip(by_axis, box, strict=True)]
        hits = [np.flatnonzero(np.diff(part.indptr)) for part in parts]
        if not all(map(len, hits)):  # beyond the new grid
            continue
        place = tuple(slice(hit[0], hit[-1] + 1) for hit in hits)
        total = (array[box] == number).astype(np.float32)
        for part, rows in zip(parts, place, strict=True):  # each axis in turn is first
            total = (part[rows] @ total.reshape(part.shape[1], -1)).T
        yield number, place, total.reshape([rows.stop - rows.start for rows in place])


def _overlaps(n, new, step, offset):
    """Return each old voxel's share [new, n] of each new one along an axis.

    Shares refer to the part on the old axis; beyond it lies its last voxel.
    """
    centre = (np.arange(new) * step + offset + 0.5)[:, None]
    first, end = np.clip((centre - step / 2, centre + step / 2), 0, n)
    beyond = end - first < TIE * step
    first = np.where(beyond, np.clip(np.floor(centre), 0, n - 1), first)
    end = np.where(beyond, first + 1, end)
    edge = np.arange(n)
    width = np.clip(np.minimum(end, edge + 1) - np.maximum(first, edge), 0, None)
    width[width < TIE * step] = 0
    return sparse.csr_array((width / width.sum(1, keepdims=True)).astype(np.float32))


def _centres(n, new, step, offset):
    """Return [new, n], 1 if the centre of the finer voxel lies in the coarser one."""
    if step > 1:
        old = np.arange(n)
        new_of = _at_centre((old - offset) / step, new)
    else:
        new_of = np.arange(new)
        old = _at_centre(new_of * step + offset, n)
    return sparse.csr_array(
        (np.ones(len(old), np.float32), (new_of, old)), shape=(new, n)
    )


def _at_centre(positions, n):
    """Return the voxels of an axis that contain these positions, in voxels."""
    return np.clip(np.floor(positions + 0.5), 0, n - 1).astype(int)
