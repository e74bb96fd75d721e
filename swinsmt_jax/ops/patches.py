"""Sliding-window geometry: where windows lie, and what their voxels weigh.

The conventions are those of MONAI's `sliding_window_inference`, so that results can be
compared voxel by voxel. numpy only: all of it is known before any device is used.
"""

import itertools
import math
from collections.abc import Sequence

import numpy as np

from swinsmt_jax import checks

BLENDS = ("gaussian", "constant")
SIGMA = 0.125  # of the Gaussian, as a share of the window's side
SMALLEST_WEIGHT = 1e-3


def padding(shape: Sequence[int], window: Sequence[int]) -> tuple[tuple[int, int], ...]:
    """Voxels to add (before, after) on each axis so that the window fits once.

    An odd number puts the larger half behind.
    """
    lacking = [max(w - n, 0) for n, w in zip(shape, window, strict=True)]
    return tuple((n // 2, n - n // 2) for n in lacking)


def window_starts(
    shape: Sequence[int], window: Sequence[int], *, overlap: float
) -> list[tuple[int, ...]]:
    """First voxels of the windows that cover a volume, the last axis fastest.

    Neighbours are side * (1 - overlap) voxels apart, rounded down, at least 1; the last
    window of an axis is moved back to end with the volume.

    Args:
        shape: sides of the volume, each at least the window's.
        window: sides of the window in voxels.
        overlap: share of a window that neighbours have in common, in [0, 1).

    Raises:
        UserError: if the window is larger than the volume or the overlap out of range.
    """
    checks.require(0 <= overlap < 1, f"overlap is {overlap}, but must lie in [0, 1).")
    checks.require(
        all(0 < w <= n for n, w in zip(shape, window, strict=True)),
        f"window {tuple(window)} does not fit into a volume of shape {tuple(shape)}; "
        "pad the volume first.",
    )
    by_axis = [
        _axis_starts(n, w, _interval(w, overlap))
        for n, w in zip(shape, window, strict=True)
    ]
    return list(itertools.product(*by_axis))


def _interval(side: int, overlap: float) -> int:
    # In binary, 20 * (1 - 0.9) is just below 2: rounding down alone would give 1.
    return max(math.floor(side * (1 - overlap) + 1e-6), 1)


def _axis_starts(length: int, side: int, interval: int) -> list[int]:
    count = 1 + math.ceil((length - side) / interval)
    return [min(i * interval, length - side) for i in range(count)]


def importance(window: Sequence[int], *, blend: str) -> np.ndarray:
    """Weight of each voxel of a window in the average, float32 `[*window]`.

    "constant" is 1 everywhere. "gaussian" falls off from the centre with a standard
    deviation of 1/8 of the side on each axis, peaks at 1 (between voxels for an even
    side), and is nowhere below 0.001, so that corners covered once keep their value.
    """
    checks.one_of("blend", blend, BLENDS)
    if blend == "constant":
        return np.ones(tuple(window), np.float32)
    weights = np.ones((), np.float32)
    for side in window:
        offset = np.arange(side, dtype=np.float32) - (side - 1) / 2
        line = np.exp(-(offset**2) / (2 * (SIGMA * side) ** 2))
        weights = weights[..., None] * line.astype(np.float32)
    return np.maximum(weights, np.float32(SMALLEST_WEIGHT))
