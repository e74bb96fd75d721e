"""Sliding-window inference over a whole scan, given a function that predicts windows.

The window's shape is part of the model: a Soft MoE mixes all tokens of its input, so
another window gives other results than the patch that the network was trained with.
"""

import itertools
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import numpy as np

from swinsmt_jax import checks
from swinsmt_jax.ops import patches

Predict = Callable[[jax.Array], jax.Array]


def sliding_window(
    predict: Predict,
    volume: np.ndarray,
    *,
    window: Sequence[int],
    num_classes: int,
    overlap: float = 0.5,
    blend: str = "gaussian",
    window_batch: int = 1,
    sharding: jax.sharding.Sharding | None = None,
) -> np.ndarray:
    """Average of the windows' logits over a whole volume, float32 `[D, H, W, K]`.

    Equals MONAI's `sliding_window_inference`: a volume smaller than the window is
    padded with 0 (air, after HU are scaled to [0, 1]) and the result cropped back.

    Args:
        predict: a jitted function `[b, *window, C] -> [b, *window, K]`. It is always
            called with b = window_batch: the last batch is filled up with zeros.
        volume: `[D, H, W, C]`, float32.
        window: sides (D, H, W) of the window in voxels; the training patch.
        num_classes: K.
        overlap: share of a window that neighbours have in common, in [0, 1).
        blend: "gaussian" or "constant" weights of a window's voxels.
        window_batch: windows per call.
        sharding: of the batches; its devices must divide `window_batch`.

    Raises:
        UserError: for a volume of another rank, or options out of range.
    """
    windows = _Windows(volume, window, overlap, blend)
    logits = np.empty((*volume.shape[:3], num_classes), np.float32)
    found = _predict_windows(predict, windows, num_classes, window_batch, sharding)
    for box, block in _blocks(windows, found, num_classes):
        windows.swept(logits)[box] = block
    return logits


def predict_labels(
    predict: Predict,
    volume: np.ndarray,
    *,
    window: Sequence[int],
    num_classes: int,
    overlap: float = 0.5,
    blend: str = "gaussian",
    window_batch: int = 1,
    sharding: jax.sharding.Sharding | None = None,
    positions: Sequence[np.ndarray] | None = None,
    sums: str = "float32",
    progress: Callable[[int, int], None] | None = None,
) -> np.ndarray:
    """Class of the largest averaged logit of each voxel, uint8 `[D, H, W]`.

    Arguments as in `sliding_window`. Windows come in layers along the axis with the
    smallest cross-section. Logits are kept only where a further window can touch them:
    between two layers of overlap 0.5 half a window deep, and they become labels behind.

    Args:
        positions: where the planes, rows and columns of another grid lie on the
            volume's, in voxels and rising. Given, probabilities are interpolated
            linearly to that grid, layer by layer, and the labels are its.
        sums: "float16" halves the memory of the logits kept, at their precision.
        progress: called with the windows done and their number, after each of them.
    """
    checks.in_range("num_classes", num_classes, 1, 256)
    checks.one_of("sums", sums, ("float32", "float16"))
    windows = _Windows(
        volume, window, overlap, blend, whole_layers=positions is not None
    )
    found = _predict_windows(predict, windows, num_classes, window_batch, sharding)
    if progress is not None:
        found = _counted(found, len(windows.starts), progress)
    blocks = _blocks(windows, found, num_classes, np.dtype(sums))
    if positions is None:
        labels = np.empty(volume.shape[:3], np.uint8)
        for box, block in blocks:
            windows.swept(labels)[box] = block.argmax(axis=-1)
        return labels
    labels = np.empty(tuple(len(axis) for axis in positions), np.uint8)
    shape = windows.swept(volume).shape[:3]
    positions = [positions[axis] for axis in windows.order]
    planes = _planes(blocks, shape, num_classes)
    for z, plane in _interpolated(planes, shape, positions):
        windows.swept(labels)[z] = plane.argmax(axis=-1)
    return labels


class _Windows:
    """Where the windows of a volume lie, and in which order they are visited.

    Attributes:
        padded: the volume, at least as large as a window.
        order: the volume's axes in the order of the sweep, its own slowest.
        sides: of a window, in this order, as all that follows.
        starts: first voxels of the windows, in the order of their visit.
        weight: of a window's voxels in the average.
        pad: voxels added in front.
        shape: of the volume without them.
    """

    def __init__(self, volume, window, overlap, blend, *, whole_layers=False):
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
        self.sides = tuple(window[axis] for axis in self.order)
        swept = tuple(size[axis] for axis in self.order)
        starts = patches.window_starts(swept, self.sides, overlap=overlap)
        self.spans = [
            _spans(sorted(set(axis)), side)
            for axis, side in zip(zip(*starts, strict=True), self.sides, strict=True)
        ]
        choices = _visits(starts, whole_layers=whole_layers)
        self.starts = min(choices, key=self._most_waiting)
        weight = patches.importance(window, blend=blend)
        self.weight = self.swept(weight)[..., None]
        self.pad = tuple(pad[axis][0] for axis in self.order)
        self.shape = tuple(volume.shape[axis] for axis in self.order)

    def swept(self, array):
        """View an array [D, H, W, ...] with its axes in the order of the sweep."""
        return array.transpose(*self.order, *range(3, array.ndim))

    def cut(self, start):
        """Return the window [*window, C] of the volume, its axes in their own order."""
        box = [slice(None)] * 3
        for axis, first, side in zip(self.order, start, self.sides, strict=True):
            box[axis] = slice(first, first + side)
        return self.padded[tuple(box)]

    def tiles(self, start):
        """Return what a window touches: [(spans, whether it is the last to do so)].

        Those that it ends come first, so that their memory is free for the others.
        """
        tiles = itertools.product(*map(dict.get, self.spans, start))
        tiles = [(t, all(map(_ends, t, start))) for t in tiles]
        return sorted(tiles, key=lambda tile: not tile[1])

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


class _Span(NamedTuple):
    """A part of an axis: first voxel, end, and start of the last window on it."""

    first: int
    end: int
    last: int


def _spans(starts, side):
    """Cut an axis where windows begin or end: {start of a window: its spans}."""
    edges = sorted({*starts, *(start + side for start in starts)})
    spans = [
        _Span(first, end, max(s for s in starts if s <= first < s + side))
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


def _blocks(windows, predictions, num_classes, dtype=np.float32):
    """Yield (box, averaged logits [*box, K]) of planes that no further window touches.

    The volume is cut into tiles at the windows' edges. The first window on a tile
    begins its sums, and the last one ends them.
    """
    waiting = {}
    for start, logits in zip(windows.starts, predictions, strict=True):
        logits = windows.swept(logits)
        for tile, ended in windows.tiles(start):
            part = tuple(
                slice(span.first - s, span.end - s)
                for span, s in zip(tile, start, strict=True)
            )
            planes = zip(logits[part], windows.weight[part], strict=True)
            held = waiting.pop(tile, None)
            begun = held is not None
            if not begun and not ended:
                shape = windows.weight[part].shape[:3]
                held = np.empty((*shape, num_classes), dtype)
                held = held, np.empty((*shape, 1), np.float32)
            for i, (plane, weight) in enumerate(planes):
                sums = (plane * weight).astype(dtype, copy=False)
                if begun:
                    sums = np.add(held[0][i], sums, out=sums)
                    weight = held[1][i] + weight
                if ended:
                    mean = sums.astype(np.float32, copy=False) / weight
                    corner = (tile[0].first + i, tile[1].first, tile[2].first)
                    yield from _inside(windows, corner, mean[None])
                else:
                    held[0][i], held[1][i] = sums, weight
            if not ended:
                waiting[tile] = held


def _inside(windows, first, block):
    """Yield the part of a block that lies in the volume, without the padding."""
    box, part = [], []
    for start, side, pad, size in zip(
        first, block.shape, windows.pad, windows.shape, strict=False
    ):
        low, high = max(start - pad, 0), min(start + side - pad, size)
        if low >= high:
            return
        box.append(slice(low, high))
        part.append(slice(low + pad - start, high + pad - start))
    yield tuple(box), block[tuple(part)]


def _planes(blocks, shape, num_classes):
    """Yield (z, logits [H, W, K]) of each plane once all of its blocks are there."""
    waiting, ready = {}, 0
    for (depth, rows, columns), block in blocks:
        plane, missing = waiting.pop(depth.start, (None, shape[1] * shape[2]))
        if plane is None:
            plane = np.empty((*shape[1:], num_classes), np.float32)
        plane[rows, columns] = block[0]
        waiting[depth.start] = plane, missing - block[0, ..., 0].size
        while ready in waiting and waiting[ready][1] == 0:
            yield ready, waiting.pop(ready)[0]
            ready += 1


def _interpolated(planes, shape, positions):
    """Yield the planes of another grid with probabilities in place of logits."""
    depth, *sides = (_neighbours(p, n) for p, n in zip(positions, shape, strict=True))
    waiting, known = 0, {}
    for z, logits in planes:
        plane = np.exp(logits - logits.max(-1, keepdims=True))
        plane /= plane.sum(-1, keepdims=True)
        for axis, (low, high, share) in enumerate(sides):
            share = share[:, None, None] if axis == 0 else share[:, None]
            plane = plane.take(low, axis) * (1 - share) + plane.take(high, axis) * share
        known = {z: plane} | {i: p for i, p in known.items() if i == z - 1}
        low, high, share = depth
        while waiting < len(low) and high[waiting] <= z:
            below, above = known[low[waiting]], known[high[waiting]]
            weight = share[waiting]
            yield waiting, below if weight == 0 else below + weight * (above - below)
            waiting += 1


def _neighbours(positions, size):
    """Return the voxels on both sides of each position, and the share of the second."""
    inside = np.clip(np.asarray(positions, np.float64), 0, size - 1)
    low = np.floor(inside).astype(int)
    share = (inside - low).astype(np.float32)
    return low, np.where(share > 0, np.minimum(low + 1, size - 1), low), share


def _predict_windows(predict, windows, num_classes, window_batch, sharding):
    """Return the windows' logits, a batch computed while the last one is used."""
    checks.positive("window_batch", window_batch)
    devices = 1 if sharding is None else sharding.num_devices
    checks.require(
        window_batch % devices == 0,
        f"window_batch is {window_batch}, but must be a multiple of {devices}, the "
        "number of devices.",
    )
    starts, size = windows.starts, windows.cut(windows.starts[0]).shape

    def launch(group):
        batch = np.zeros((window_batch, *size), np.float32)
        for i, start in enumerate(group):
            batch[i] = windows.cut(start)
        logits = predict(jax.device_put(batch, sharding))
        wanted = (*size[:3], num_classes)
        checks.require(
            logits.shape[1:] == wanted,
            f"predict returned {logits.shape[1:]} for a window, but {wanted} is "
            f"needed: num_classes is {num_classes}.",
        )
        return logits[: len(group)]

    def run():
        waiting = None
        for first in range(0, len(starts), window_batch):
            logits = launch(starts[first : first + window_batch])
            if waiting is not None:
                yield from np.asarray(waiting)
            waiting = logits
        yield from np.asarray(waiting)

    return run()


def _counted(items, number, progress):
    for done, item in enumerate(items, start=1):
        yield item
        progress(done, number)
