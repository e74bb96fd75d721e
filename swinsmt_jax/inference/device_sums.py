"""Average windows in the accelerator's memory, a layer of windows at a time.

Only class ids, or planes of them, return to the host. A window of 128^3 has a gigabyte
of logits for 118 classes. Links and the host's memory cannot carry that in the time
that an accelerator takes to compute it.
"""

import functools
import itertools
from collections.abc import Iterable, Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from swinsmt_jax.inference import grid
from swinsmt_jax.inference.windows import Box, Windows


def needed_bytes(windows: Windows, num_classes: int, dtype: str) -> int:
    """Return the bytes that the sums of a layer of windows take."""
    depth, voxel = windows.sides[0], np.dtype(dtype).itemsize * num_classes + 4
    return depth * windows.size[1] * windows.size[2] * voxel


def labels(
    windows: Windows,
    predictions: Iterable[tuple[jax.Array, int]],
    num_classes: int,
    dtype: str,
    decision: grid.Decision,
) -> Iterator[tuple[Box, grid.Decided]]:
    """Yield (box, decisions, [*box]) of layers that no further window touches.

    Args:
        windows: in whole layers.
        predictions: (logits of a batch [b, *window, K] on one device, index in it) of
            each window.
        num_classes: K.
        dtype: of the sums.
        decision: how logits become labels.
    """
    for z, done, held in _layers(windows, predictions, num_classes, dtype):
        found = _decided(*held, done=done, decision=decision).each(np.asarray)
        for box, inside in windows.inside((z, 0, 0), found.labels.shape):
            yield box, found.each(lambda array, inside=inside: array[inside])


def planes(
    windows: Windows,
    predictions: Iterable[tuple[jax.Array, int]],
    num_classes: int,
    dtype: str,
    decision: grid.Decision,
    sides: Sequence[grid.Neighbours],
) -> Iterator[tuple[int, jax.Array]]:
    """Yield (z, interpolated values) of each plane, on another grid's rows and columns.

    Arguments as in `labels`; `sides` as in `host_sums.planes`.
    """
    finish = functools.partial(_interpolated, decision=decision)
    inner = tuple(
        (pad, pad + size)
        for pad, size in zip(windows.pad[1:], windows.shape[1:], strict=True)
    )
    for first, done, held in _layers(windows, predictions, num_classes, dtype):
        for i in range(done):
            z = first + i - windows.pad[0]
            if 0 <= z < windows.shape[0]:
                yield z, finish(*held, i, *sides, inner=inner)


def _layers(windows, predictions, num_classes, dtype):
    """Yield (first plane, number of planes, sums) when a layer completes planes."""
    shape = (windows.sides[0], *windows.size[1:])
    held = jnp.zeros((*shape, num_classes), dtype), jnp.zeros((*shape, 1))
    weight, predictions = jnp.asarray(windows.weight), iter(predictions)
    layers = itertools.groupby(windows.starts, key=lambda start: start[0])
    layers = [(z, list(starts)) for z, starts in layers]
    ends = [z for z, _ in layers[1:]] + [windows.size[0]]
    for (z, starts), end in zip(layers, ends, strict=True):
        for (_, *corner), (batch, i) in zip(starts, predictions, strict=False):
            held = _add(held, batch, i, weight, corner, order=windows.order)
        yield z, end - z, held
        held = _advance(held, end - z)


@functools.partial(jax.jit, donate_argnums=0, static_argnames="order")
def _add(held, batch, index, weight, corner, *, order):
    """Add a window's logits and weights to the sums of its layer."""
    logits = lax.dynamic_index_in_dim(batch, index, keepdims=False)
    logits = logits.transpose(*order, 3)

    def add(sums, new):
        start = (0, *corner, 0)
        part = lax.dynamic_slice(sums, start, new.shape)
        return lax.dynamic_update_slice(sums, part + new.astype(sums.dtype), start)

    return add(held[0], logits * weight), add(held[1], weight)


@functools.partial(jax.jit, static_argnames=("done", "decision"))
def _decided(sums, weights, *, done, decision):
    """Decide the first planes, [done, H, W]."""

    def of_plane(i):
        mean = sums[i].astype(jnp.float32) / weights[i]
        return decision.decide(jnp, mean, logits=True)

    return lax.map(of_plane, jnp.arange(done))


@functools.partial(jax.jit, static_argnames=("inner", "decision"))
def _interpolated(sums, weights, i, rows, columns, *, inner, decision):
    mean = sums[i].astype(jnp.float32) / weights[i]
    (top, bottom), (left, right) = inner
    mean = mean[top:bottom, left:right]
    return grid.interpolated(jnp, mean, rows, columns, decision=decision)


@functools.partial(jax.jit, donate_argnums=0)
def _advance(held, done):
    """Drop the first `done` planes in place, and append zeros."""
    depth = held[0].shape[0]

    def move(i, array):
        source = jnp.minimum(i + done, depth - 1)
        plane = jnp.where(i + done < depth, array[source], 0)
        return array.at[i].set(plane)

    return tuple(lax.fori_loop(0, depth, move, array) for array in held)
