"""Label ids on another grid, without moving a border."""

from collections.abc import Sequence

import numpy as np
from scipy import ndimage, sparse

TIE = 1e-5  # shares of a voxel that differ by less are equal


def fill_most(
    array: np.ndarray,
    step: Sequence[float],
    offset: Sequence[float],
    shape: Sequence[int],
) -> np.ndarray:
    """Return for each voxel of another grid the label id that fills most of it.

    Step and offset as in `ndimage.affine_transform`. Where two ids fill equal shares,
    as at every second face when voxels double, one wins in the even voxels and the
    other in the odd ones, like a chessboard: nothing moves, grows or shrinks.
    """
    grids = zip(array.shape, shape, step, offset, strict=True)
    shares = [_overlaps(*grid) for grid in grids]
    found, best = np.zeros(shape, array.dtype), np.zeros(shape, np.float32)
    background = np.ones(shape, np.float32)
    signs = [(1 - np.arange(n) % 2 * 2).astype(np.float32) for n in shape]
    margin = TIE * np.einsum("i,j,k->ijk", *signs)
    for number, box in enumerate(ndimage.find_objects(array), start=1):
        if box is None:
            continue
        parts = [weights[:, side] for weights, side in zip(shares, box, strict=True)]
        hits = [np.flatnonzero(np.diff(part.indptr)) for part in parts]
        if not all(map(len, hits)):  # beyond the new grid
            continue
        place = tuple(slice(hit[0], hit[-1] + 1) for hit in hits)
        share = (array[box] == number).astype(np.float32)
        for part, rows in zip(parts, place, strict=True):  # each axis in turn is first
            share = (part[rows] @ share.reshape(part.shape[1], -1)).T
        share = share.reshape(best[place].shape)
        background[place] -= share
        wins = share > best[place] + margin[place]
        found[place][wins], best[place][wins] = number, share[wins]
    found[background > best + margin] = 0
    return found


def _overlaps(n, new, step, offset):
    """Return which share [new, n] of each new voxel each old one has, along an axis."""
    centre = np.clip(np.arange(new) * step + offset + 0.5, 0, n)[:, None]
    first, end = np.clip((centre - step / 2, centre + step / 2), 0, n)
    edge = np.arange(n)
    width = np.clip(np.minimum(end, edge + 1) - np.maximum(first, edge), 0, None)
    width[width < TIE * step] = 0
    return sparse.csr_array((width / width.sum(1, keepdims=True)).astype(np.float32))
