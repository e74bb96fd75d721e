"""Places, voxel weights and order of the windows of a volume.

The conventions are those of MONAI's `sliding_window_inference` or nnU-Net's predictor,
so results can be compared voxel by voxel. This module uses only numpy: everything is
known before any device is used.
"""

import itertools
import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from swinsmt_jax import checks

CONVENTIONS = ("monai", "nnunet")
BLENDS = ("gaussian", "constant")
SIGMA = 0.125  # of the Gaussian, as a share of the window's side
SMALLEST_WEIGHT = 1e-3

Start = tuple[int, ...]
Box = tuple[slice, ...]


def padding(shape: Sequence[int], window: Sequence[int]) -> tuple[tuple[int, int], ...]:
    """Return the voxels to add (before, after) per axis so that the window fits once.

    If the number is odd, the larger half comes last.
    """
    lacking = [max(w - n, 0) for n, w in zip(shape, window, strict=True)]
    return tuple((n // 2, n - n // 2) for n in lacking)


def window_starts(
    shape: Sequence[int],
    window: Sequence[int],
    *,
    overlap: float,
    convention: str = "monai",
) -> list[Start]:
    """Return the first voxels of the windows that cover a volume, last axis fastest.

    Neighbours are side * (1 - overlap) voxels apart, rounded down, at least 1. The last
    window of an axis moves back to end with the volume. With nnU-Net's convention they
    are at most side * (1 - overlap) voxels apart, evenly over the whole axis.

    Args:
        shape: sides of the volume, each at least the window's.
        window: sides of the window in voxels.
        overlap: share of a window that its neighbours cover too, in [0, 1).
        convention: one of CONVENTIONS.

    Raises:
        UserError: if the window is larger than the volume or the overlap out of range.
    """
    checks.require(0 <= overlap < 1, f"overlap is {overlap}, but must lie in [0, 1).")
    checks.require(
        all(0 < w <= n for n, w in zip(shape, window, strict=True)),
        f"window {tuple(window)} does not fit into a volume of shape {tuple(shape)}; "
        "pad the volume first.",
    )
    checks.one_of("convention", convention, CONVENTIONS)
    starts = _axis_starts if convention == "monai" else _even_starts
    by_axis = [starts(n, w, overlap) for n, w in zip(shape, window, strict=True)]
    return list(itertools.product(*by_axis))


def _axis_starts(length: int, side: int, overlap: float) -> list[int]:
    # In binary, 20 * (1 - 0.9) is just below 2: rounding down alone would give 1.
    interval = max(math.floor(side * (1 - overlap) + 1e-6), 1)
    count = 1 + math.ceil((length - side) / interval)
    return [min(i * interval, length - side) for i in range(count)]


def _even_starts(length: int, side: int, overlap: float) -> list[int]:
    count = math.ceil((length - side) / (side * (1 - overlap))) + 1
    step = (length - side) / max(count - 1, 1)
    return [int(np.round(step * i)) for i in range(count)]


def importance(
    window: Sequence[int], *, blend: str, convention: str = "monai"
) -> np.ndarray:
    """Return the weight of each voxel of a window in the average, float32 `[*window]`.

    "constant" is 1 everywhere. "gaussian" falls off from the centre with a standard
    deviation of 1/8 of the side on each axis. It peaks at 1 (between voxels for an even
    side) and is never below 0.001, so corners covered once keep their value. nnU-Net's
    Gaussian peaks at 10 on the voxel side // 2 and ends four deviations from there. It
    is rounded to half precision, with the smallest number of that instead of 0.
    """
    checks.one_of("blend", blend, BLENDS)
    if blend == "constant":
        return np.ones(tuple(window), np.float32)
    if convention == "nnunet":
        return _importance_of_nnunet(window)
    weights = np.ones((), np.float32)
    for side in window:
        offset = np.arange(side, dtype=np.float32) - (side - 1) / 2
        line = np.exp(-(offset**2) / (2 * (SIGMA * side) ** 2))
        weights = weights[..., None] * line.astype(np.float32)
    return np.maximum(weights, np.float32(SMALLEST_WEIGHT))


def _importance_of_nnunet(window):
    from scipy import ndimage  # not for those who only import `load`

    impulse = np.zeros(tuple(window))
    impulse[tuple(side // 2 for side in window)] = 1
    sigma = [SIGMA * side for side in window]
    weights = ndimage.gaussian_filter(impulse, sigma, mode="constant")
    weights = (weights / (weights.max() / 10)).astype(np.float16)
    weights[weights == 0] = weights[weights > 0].min()
    return weights.astype(np.float32)


class Span(NamedTuple):
    """A part of an axis: first voxel, end, and start of the last window on it."""

    first: int
    end: int
    last: int


class Windows:
    """The windows of a volume in the order of their visit.

    Attributes:
        padded: the volume, at least as large as a window.
        order: the volume's axes in the order of the sweep, slowest first.
        size: of the padded volume, in this order, like all that follows.
        sides: of a window.
        starts: first voxels of the windows, in layers, in rows.
        weight: of a window's voxels in the average, `[*sides, 1]`.
        pad: voxels added in front.
        shape: of the volume without these.
    """

    def __init__(
        self,
        volume: np.ndarray,
        window: Sequence[int],
        overlap: float,
        blend: str,
        convention: str = "monai",
        fill: float = 0.0,
    ):
        checks.require(
            volume.ndim == 4 and len(window) == 3,
            f"volume has shape {volume.shape} and window {tuple(window)}, but the "
            "volume must be [D, H, W, C] and the window (D, H, W).",
        )
        pad = padding(volume.shape[:3], window)
        self.padded = volume
        if any(map(any, pad)):
            self.padded = np.pad(volume, (*pad, (0, 0)), constant_values=fill)
        size = self.padded.shape[:3]
        self.order = tuple(sorted(range(3), key=lambda axis: -size[axis]))
        self.size = tuple(size[axis] for axis in self.order)
        self.sides = tuple(window[axis] for axis in self.order)
        self.starts = window_starts(
            self.size, self.sides, overlap=overlap, convention=convention
        )
        axes = zip(map(set, zip(*self.starts, strict=True)), self.sides, strict=True)
        self.spans = [_spans(sorted(axis), side) for axis, side in axes]
        weight = importance(window, blend=blend, convention=convention)
        self.weight = self.swept(weight)[..., None]
        self.pad = tuple(pad[axis][0] for axis in self.order)
        self.shape = tuple(volume.shape[axis] for axis in self.order)

    def visit_last_in_turn(self) -> None:
        """Visit the last two windows of an axis in turn at each place on faster axes.

        The last window moves back to the volume's end and shares more with the one
        before than others do. Visiting both in turn makes labels of the shared part
        sooner. Windows no longer come in layers.
        """
        groups = [
            {start: min(i, len(axis) - 2) for i, start in enumerate(axis)}
            for axis in self.spans
        ]
        self.starts.sort(key=lambda s: (*map(dict.get, groups, s), *s))

    def swept(self, array: np.ndarray) -> np.ndarray:
        """View an array [D, H, W, ...] with its axes in the order of the sweep."""
        return array.transpose(*self.order, *range(3, array.ndim))

    def place(self, start: Start) -> Start:
        """Return the first voxel of a window in the axes of the volume."""
        place = dict(zip(self.order, np.subtract(start, self.pad), strict=True))
        return tuple(int(place[axis]) for axis in range(3))

    def cut(self, start: Start) -> np.ndarray:
        """Return the window [*window, C] of the volume, its axes in their own order."""
        box = [slice(None)] * 3
        for axis, first, side in zip(self.order, start, self.sides, strict=True):
            box[axis] = slice(first, first + side)
        return self.padded[tuple(box)]

    def tiles(self, start: Start) -> list[tuple[tuple[Span, ...], bool]]:
        """Return a window's tiles: [(spans, whether no later window touches them)].

        Tiles that it completes come first, so their memory is free for the others.
        """
        touched = [axis[first] for axis, first in zip(self.spans, start, strict=True)]
        tiles = [
            (tile, tuple(span.last for span in tile) == start)
            for tile in itertools.product(*touched)
        ]
        return sorted(tiles, key=lambda tile: not tile[1])

    def inside(
        self, first: Sequence[int], shape: Sequence[int]
    ) -> Iterator[tuple[Box, Box]]:
        """Yield (box, part) of a block that begins at `first`, without the padding.

        The box refers to the volume, the part to the block.
        """
        box, part = [], []
        for start, side, pad, size in zip(
            first, shape, self.pad, self.shape, strict=False
        ):
            low, high = max(start - pad, 0), min(start + side - pad, size)
            if low >= high:
                return
            box.append(slice(low, high))
            part.append(slice(low + pad - start, high + pad - start))
        yield tuple(box), tuple(part)


def _spans(starts, side):
    """Cut an axis at the edges of windows: {start of a window: its spans}."""
    edges = sorted({*starts, *(start + side for start in starts)})
    spans = [
        Span(first, end, max(s for s in starts if s <= first < s + side))
        for first, end in itertools.pairwise(edges)
    ]
    return {s: [p for p in spans if s <= p.first < s + side] for s in starts}
