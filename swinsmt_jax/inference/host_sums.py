"""Average windows in the host's memory, in tiles that windows begin and end."""

import functools
from collections.abc import Iterable, Iterator, Sequence

import jax
import numpy as np

from swinsmt_jax.inference import grid
from swinsmt_jax.inference.sweep import Windows

Block = tuple[tuple[slice, ...], np.ndarray]


def blocks(
    windows: Windows,
    predictions: Iterable[tuple[jax.Array, int]],
    num_classes: int,
    dtype: str = "float32",
) -> Iterator[Block]:
    """Yield (box, averaged logits [*box, K]) of planes that no further window touches.

    The volume is cut into tiles at the windows' edges. The first window on a tile
    begins its sums, and the last one ends them. Boxes and axes are those of the sweep.

    Args:
        windows: with any of its orders of visit.
        predictions: (logits of a batch [b, *window, K], index in it) of each window.
        num_classes: K.
        dtype: of the sums.
    """
    waiting, add = {}, _adder(dtype)
    for start, (batch, index) in zip(windows.starts, predictions, strict=True):
        logits = windows.swept(np.asarray(batch)[index])
        for tile, ended in windows.tiles(start):
            part = tuple(
                slice(span.first - s, span.end - s)
                for span, s in zip(tile, start, strict=True)
            )
            held = waiting.pop(tile, None)
            begun = held is not None
            if not begun and not ended:
                shape = windows.weight[part].shape[:3]
                held = np.empty((*shape, num_classes), dtype)
                held = held, np.empty((*shape, 1), np.float32)
            planes = zip(logits[part], windows.weight[part], strict=True)
            for i, (plane, weight) in enumerate(planes):
                before = held[0][i] if begun else None
                total = held[1][i] + weight if begun else weight
                if ended:
                    mean = _add(before, plane, weight) / total
                    corner = (tile[0].first + i, tile[1].first, tile[2].first)
                    yield from windows.inside(corner, mean[None])
                else:
                    held[0][i], held[1][i] = add(before, plane, weight), total
            if not ended:
                waiting[tile] = held


def _add(before, plane, weight):
    """Return plane * weight, added to what was there before, in float32."""
    product = plane * weight
    return product if before is None else before + product


def _adder(dtype):
    """Return `_add` that may end in `dtype`, compiled for this host's CPU if need be.

    numpy converts to half precision one number at a time, which takes ten times as
    long. Compiled, multiplication and addition may round once: float32 sums, which are
    those of one accumulator bit for bit, are left to numpy.
    """
    if dtype == "float32":
        return _add
    try:
        cpu = jax.local_devices(backend="cpu")[0]
    except RuntimeError:  # JAX_PLATFORMS leaves the CPU out
        return _add

    def add(before, plane, weight):
        with jax.default_device(cpu):
            return np.asarray(_compiled_add(before, plane, weight, dtype=dtype))

    return add


@functools.partial(jax.jit, static_argnames="dtype")
def _compiled_add(before, plane, weight, *, dtype):
    return _add(before, plane, weight).astype(dtype)


def labels(
    windows: Windows,
    predictions: Iterable[tuple[jax.Array, int]],
    num_classes: int,
    dtype: str,
) -> Iterator[Block]:
    """Yield (box, class ids [*box]) of planes that no further window touches."""
    for box, block in blocks(windows, predictions, num_classes, dtype):
        yield box, block.argmax(axis=-1)


def planes(
    windows: Windows,
    predictions: Iterable[tuple[jax.Array, int]],
    num_classes: int,
    dtype: str,
    sides: Sequence[grid.Neighbours],
) -> Iterator[tuple[int, np.ndarray]]:
    """Yield (z, probabilities) of each plane, on the rows and columns of another grid.

    Args:
        windows: in whole layers.
        predictions, num_classes, dtype: as in `blocks`.
        sides: neighbours of the other grid's rows and of its columns.
    """
    found = blocks(windows, predictions, num_classes, dtype)
    _, height, width = windows.shape
    waiting, ready = {}, 0
    for (depth, rows, columns), block in found:
        plane, missing = waiting.pop(depth.start, (None, height * width))
        if plane is None:
            plane = np.empty((height, width, num_classes), dtype)
        plane[rows, columns] = block[0]
        waiting[depth.start] = plane, missing - block[0, ..., 0].size
        while ready in waiting and waiting[ready][1] == 0:
            plane = waiting.pop(ready)[0].astype(np.float32, copy=False)
            yield ready, grid.probabilities(np, plane, *sides)
            ready += 1
