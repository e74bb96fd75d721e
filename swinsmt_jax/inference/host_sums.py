"""Average windows in the host's memory, in tiles cut at the windows' edges."""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import jax
import numpy as np

from swinsmt_jax.inference import grid
from swinsmt_jax.inference.windows import Box, Windows

Predictions = Iterable[tuple[jax.Array, int]]


class Tile:
    """Weighted sums of a box's logits; the first `add` allocates memory.

    Attributes:
        dtype: of the sums.
        sums: of logits times weights, [d, h, w, K].
        weights: their sum, [d, h, w, 1].
    """

    def __init__(self, dtype: str):
        self.dtype = dtype
        self.sums: np.ndarray | None = None
        self.weights = np.zeros(0, np.float32)

    def add(self, logits: np.ndarray, weight: np.ndarray) -> None:
        """Add a window's logits plane by plane, which needs little extra memory."""
        if self.sums is None:
            self.sums = np.zeros(logits.shape, self.dtype)
            self.weights = np.zeros(weight.shape, np.float32)
        self.weights += weight
        add = _add if self.dtype == "float32" else _add_halves
        for i, part in enumerate(zip(self.sums, logits, weight, strict=True)):
            self.sums[i] = add(*part)

    def finish(self, logits: np.ndarray, weight: np.ndarray) -> Iterator[np.ndarray]:
        """Add the last window's logits and yield the average, plane by plane."""
        for i, (plane, share) in enumerate(zip(logits, weight, strict=True)):
            if self.sums is None:
                yield plane * share / share
            else:
                yield _add(self.sums[i], plane, share) / (self.weights[i] + share)


def blocks(
    windows: Windows, predictions: Predictions, num_classes: int, dtype: str = "float32"
) -> Iterator[tuple[Box, np.ndarray]]:
    """Yield (box, averaged logits [*box, K]) of planes that no further window touches.

    Tiles divide the volume at the windows' edges. Boxes and axes follow the sweep.

    Args:
        windows: in any order of visit.
        predictions: (logits of a batch [b, *window, K], index in it) of each window.
        num_classes: K.
        dtype: of the sums.
    """
    waiting: defaultdict[Any, Tile] = defaultdict(lambda: Tile(dtype))
    predictions = iter(predictions)
    for start in windows.starts:
        batch, index = next(predictions)
        logits = windows.swept(np.asarray(batch)[index])
        for spans, ended in windows.tiles(start):
            part = tuple(
                slice(span.first - s, span.end - s)
                for span, s in zip(spans, start, strict=True)
            )
            given = logits[part], windows.weight[part]
            if not ended:
                waiting[spans].add(*given)
                continue
            z, *corner = (span.first for span in spans)
            planes = waiting[spans].finish(*given)
            for i, plane in enumerate(planes):
                block, first = plane[None], (z + i, *corner)
                for box, inside in windows.inside(first, block.shape):
                    yield box, block[inside]
            del waiting[spans], planes
        del batch, logits, given  # before the next window is computed


def _add(sums, plane, weight):
    return sums + plane * weight


def _add_halves(sums, plane, weight):
    """Return `_add` in half precision, compiled for this host's CPU if it may be used.

    numpy converts to half precision one number at a time, which takes five times as
    long. A compiled multiplication and addition may round once. So numpy keeps float32
    sums, which equal those of one accumulator bit for bit.
    """
    try:
        cpu = jax.local_devices(backend="cpu")[0]
    except RuntimeError:  # JAX_PLATFORMS leaves the CPU out
        return _add(sums, plane, weight)
    with jax.default_device(cpu):
        return _compiled_add(sums, plane, weight)


@jax.jit
def _compiled_add(sums, plane, weight):
    return _add(sums, plane, weight).astype(sums.dtype)


def labels(
    windows: Windows,
    predictions: Predictions,
    num_classes: int,
    dtype: str,
    decision: grid.Decision,
) -> Iterator[tuple[Box, grid.Decided]]:
    """Yield (box, decisions, [*box]) of planes that no further window touches."""
    for box, block in blocks(windows, predictions, num_classes, dtype):
        yield box, decision.decide(np, block, logits=True)


def planes(
    windows: Windows,
    predictions: Predictions,
    num_classes: int,
    dtype: str,
    decision: grid.Decision,
    sides: Sequence[grid.Neighbours],
) -> Iterator[tuple[int, np.ndarray]]:
    """Yield (z, interpolated values) of each plane, on another grid's rows and columns.

    Args:
        windows: in whole layers.
        predictions, num_classes, dtype: as in `blocks`.
        decision: selects the values to interpolate.
        sides: neighbours of the other grid's rows and of its columns.
    """
    _, height, width = windows.shape
    waiting: dict = {}
    ready = 0
    for box, block in blocks(windows, predictions, num_classes, dtype):
        depth, *inside = box
        plane, missing = waiting.pop(depth.start, (None, height * width))
        if plane is None:
            plane = np.empty((height, width, num_classes), dtype)
        plane[tuple(inside)] = block[0]
        waiting[depth.start] = plane, missing - block[0, ..., 0].size
        while ready in waiting and waiting[ready][1] == 0:
            plane = waiting.pop(ready)[0].astype(np.float32, copy=False)
            yield ready, grid.interpolated(np, plane, *sides, decision=decision)
            ready += 1
