"""Where the windows of a volume lie, and the order in which they are visited."""

import itertools
import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from swinsmt_jax import checks
from swinsmt_jax.ops import patches

Start = tuple[int, ...]


class Span(NamedTuple):
    """A part of an axis: first voxel, end, and start of the last window on it."""

    first: int
    end: int
    last: int


class Windows:
    """Where the windows of a volume lie, and in which order they are visited.

    Attributes:
        padded: the volume, at least as large as a window.
        order: the volume's axes in the order of the sweep, its own slowest.
        size: of the padded volume, in this order, as all that follows.
        sides: of a window.
        starts: first voxels of the windows, in the order of their visit: in layers, in
            rows, unless `spare_memory` changes it.
        weight: of a window's voxels in the average.
        pad: voxels added in front.
        shape: of the volume without them.
    """

    def __init__(self, volume, window, overlap, blend):
        checks.require(
            volume.ndim == 4 and len(window) == 3,
            f"volume has shape {volume.shape} and window {tuple(window)}, but the "
            "volume must be [D, H, W, C] and the window (D, H, W).",
        )
        pad = patches.padding(volume.shape[:3], window)
        self.padded = volume
        if any(map(any, pad)):
            self.padded = np.pad(volume, (*pad, (0, 0)))
        size = self.padded.shape[:3]
        self.order = tuple(sorted(range(3), key=lambda axis: -size[axis]))
        self.size = tuple(size[axis] for axis in self.order)
        self.sides = tuple(window[axis] for axis in self.order)
        self.starts = patches.window_starts(self.size, self.sides, overlap=overlap)
        axes = zip(*self.starts, strict=True)
        self.spans = [
            _spans(sorted(set(axis)), side)
            for axis, side in zip(axes, self.sides, strict=True)
        ]
        weight = patches.importance(window, blend=blend)
        self.weight = self.swept(weight)[..., None]
        self.pad = tuple(pad[axis][0] for axis in self.order)
        self.shape = tuple(volume.shape[axis] for axis in self.order)

    def swept(self, array: np.ndarray) -> np.ndarray:
        """View an array [D, H, W, ...] with its axes in the order of the sweep."""
        return array.transpose(*self.order, *range(3, array.ndim))

    def cut(self, start: Start) -> np.ndarray:
        """Return the window [*window, C] of the volume, its axes in their own order."""
        box = [slice(None)] * 3
        for axis, first, side in zip(self.order, start, self.sides, strict=True):
            box[axis] = slice(first, first + side)
        return self.padded[tuple(box)]

    def tiles(self, start: Start) -> list[tuple[tuple[Span, ...], bool]]:
        """Return what a window touches: [(spans, whether it is the last to do so)].

        Those that it ends come first, so that their memory is free for the others.
        """
        tiles = itertools.product(*map(dict.get, self.spans, start))
        tiles = [(t, all(map(_ends, t, start))) for t in tiles]
        return sorted(tiles, key=lambda tile: not tile[1])

    def spare_memory(self, *, whole_layers: bool) -> None:
        """Take the order of visit in which the fewest voxels wait for others.

        With `whole_layers`, windows still come layer by layer.
        """
        choices = _visits(self.starts, whole_layers=whole_layers)
        self.starts = min(choices, key=self._most_waiting)

    def _most_waiting(self, visits):
        """Return how many voxels wait for further windows at most."""
        waiting, most = {}, 0
        for start in visits:
            for tile, ended in self.tiles(start):
                if ended:
                    waiting.pop(tile, None)
                else:
                    waiting[tile] = math.prod(span.end - span.first for span in tile)
            most = max(most, sum(waiting.values()))
        return most

    def inside(
        self, first: Sequence[int], block: np.ndarray
    ) -> Iterator[tuple[tuple[slice, ...], np.ndarray]]:
        """Yield (box, part) of a block that begins at `first`, without the padding."""
        box, part = [], []
        for start, side, pad, size in zip(
            first, block.shape, self.pad, self.shape, strict=False
        ):
            low, high = max(start - pad, 0), min(start + side - pad, size)
            if low >= high:
                return
            box.append(slice(low, high))
            part.append(slice(low + pad - start, high + pad - start))
        yield tuple(box), block[tuple(part)]


def _spans(starts, side):
    """Cut an axis where windows begin or end: {start of a window: its spans}."""
    edges = sorted({*starts, *(start + side for start in starts)})
    spans = [
        Span(first, end, max(s for s in starts if s <= first < s + side))
        for first, end in itertools.pairwise(edges)
    ]
    return {s: [p for p in spans if s <= p.first < s + side] for s in starts}


def _ends(span, start):
    return span.last == start


def _visits(starts, *, whole_layers):
    """Yield orders of visit in which every tile is ended by its last window.

    The first is layer by layer, row by row. The last window of an axis is moved back to
    the volume's end and shares more with its neighbour than others do. If the two are
    visited in turn at every place on the faster axes, that waits for a shorter time;
    with `whole_layers` not on the slowest axis.
    """
    axes = [sorted(set(axis)) for axis in zip(*starts, strict=True)]
    for in_turn in itertools.product((False, True), repeat=3):
        if whole_layers and in_turn[0]:
            return
        groups = [
            {s: min(i, len(axis) - 2) if pair else i for i, s in enumerate(axis)}
            for axis, pair in zip(axes, in_turn, strict=True)
        ]
        yield sorted(starts, key=lambda s: (*map(dict.get, groups, s), *s))
