"""Probabilities on another grid, by linear interpolation between planes and in them."""

from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import numpy as np


class Neighbours(NamedTuple):
    """Voxels on both sides of positions on an axis, and the share of the second."""

    low: np.ndarray
    high: np.ndarray
    share: np.ndarray


def neighbours(positions: np.ndarray, size: int) -> Neighbours:
    """Return the voxels beside each position; beyond the axis, its first or last."""
    inside = np.clip(np.asarray(positions, np.float64), 0, size - 1)
    low = np.floor(inside).astype(int)
    share = (inside - low).astype(np.float32)
    return Neighbours(
        low, np.where(share > 0, np.minimum(low + 1, size - 1), low), share
    )


def probabilities(
    numpy: Any, logits: Any, rows: Neighbours, columns: Neighbours
) -> Any:
    """Softmax of a plane's logits [H, W, K], interpolated to rows and columns.

    `numpy` is the module of the array: numpy or jax.numpy.
    """
    plane = numpy.exp(logits - logits.max(-1, keepdims=True))
    plane /= plane.sum(-1, keepdims=True)
    for axis, (low, high, share) in enumerate((rows, columns)):
        share = share[:, None, None] if axis == 0 else share[:, None]
        plane = plane.take(low, axis) * (1 - share) + plane.take(high, axis) * share
    return plane


def between(planes: Iterable, depth: Neighbours) -> Iterator:
    """Yield (index, plane) at each position between planes (z, plane) in order."""
    waiting = 0
    known: dict = {}
    for z, plane in planes:
        known = {z: plane} | {i: p for i, p in known.items() if i == z - 1}
        while waiting < len(depth.low) and depth.high[waiting] <= z:
            below, above = known[depth.low[waiting]], known[depth.high[waiting]]
            share = depth.share[waiting]
            yield waiting, below if share == 0 else below + share * (above - below)
            waiting += 1
