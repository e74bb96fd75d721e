"""Softmax attention within windows, whose weights are not kept for the backward pass.

Axes: b batch, w windows, i and j tokens of a window, h heads, c channels of a head.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax

from swinsmt_jax.ops import windows
from swinsmt_jax.ops.manual_axes import vary_alike
from swinsmt_jax.ops.tracing import traced_once

# Entries of the attention matrices of one sample that are made at a time. On a CPU 4 MB
# of float32, which stay in its cache; on an accelerator 256 MB, of which forward and
# backward hold a few: all windows of a 128^3 patch would be 1.4 GB each.
CPU_BLOCK = 2**20
ACCELERATOR_BLOCK = 2**26
IN_FLOAT32 = {"preferred_element_type": jnp.float32}


def weights(
    q: jax.Array, k: jax.Array, bias: jax.Array, regions: jax.Array | None
) -> jax.Array:
    """Return the attention weights, float32 [B, W, h, n, n].

    Args:
        q, k: [B, W, n, h, c]; the queries are scaled by 1 / sqrt(c).
        bias: [h, n, n], added to the logits.
        regions: int [W, n]; tokens of different numbers are kept apart.
    """
    q = q * q.shape[-1] ** -0.5
    logits = jnp.einsum("bwihc,bwjhc->bwhij", q, k, **IN_FLOAT32) + bias
    if regions is not None:
        apart = regions[:, None, :, None] != regions[:, None, None, :]
        logits = logits + jnp.where(apart, windows.DIFFERENT_REGION, 0.0)
    return jax.nn.softmax(logits, axis=-1)


def average(weights: jax.Array, v: jax.Array) -> jax.Array:
    """Average values [B, W, n, h, c] with weights [B, W, h, n, n], in their dtype."""
    return jnp.einsum("bwhij,bwjhc->bwihc", weights.astype(v.dtype), v)


def attend(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    bias: jax.Array,
    regions: jax.Array | None = None,
) -> jax.Array:
    """Average the values of each window with `weights`.

    The backward pass makes the weights again, from queries and keys. Forward and
    backward go through the windows in blocks, a few at a time on a CPU.

    Args:
        q, k, v: [B, W, n, h, c].
        bias: [h, n, n].
        regions: int [W, n], or None.

    Returns:
        [B, W, n, h, c] in the values' dtype.
    """
    return _attend(*vary_alike(q, k, v, bias, regions))


@jax.custom_vjp
def _attend(q, k, v, bias, regions):
    return _on_each_platform(_forward, bias, (q, k, v), regions)[0]


def _attend_forward(q, k, v, bias, regions):
    return _attend(q, k, v, bias, regions), (q, k, v, bias, regions)


def _attend_backward(saved, cotangent):
    q, k, v, bias, regions = saved
    (dq, dk, dv), dbias = _on_each_platform(
        _backward, bias, (q, k, v, cotangent), regions
    )
    return dq, dk, dv, dbias.astype(bias.dtype), None


_attend.defvjp(_attend_forward, _attend_backward)


def _forward(bias, windowed, regions):
    q, k, v = windowed
    return average(weights(q, k, bias, regions), v), ()


def _backward(bias, windowed, regions):
    """With weights p and cotangent g, the logits' slope is p (g . v - sum p g . v)."""
    q, k, v, g = windowed
    p = weights(q, k, bias, regions)
    dv = jnp.einsum("bwhij,bwihc->bwjhc", p.astype(v.dtype), g)
    slope = jnp.einsum("bwihc,bwjhc->bwhij", g, v, **IN_FLOAT32)
    slope = p * (slope - jnp.sum(p * slope, axis=-1, keepdims=True))
    dbias = slope.sum(1)
    slope = slope.astype(q.dtype)
    scale = q.shape[-1] ** -0.5
    dq = jnp.einsum("bwhij,bwjhc->bwihc", slope, k) * scale
    dk = jnp.einsum("bwhij,bwihc->bwjhc", slope, q) * scale
    return (dq, dk, dv), dbias


def _on_each_platform(function, *arguments):
    """Go through the windows in blocks of the platform that it is lowered for.

    Returns the results by window, and the sums over windows and batch of the others.
    """
    return _in_either_block(function, (CPU_BLOCK, ACCELERATOR_BLOCK), *arguments)


@functools.partial(traced_once, static_argnums=(0, 1))
def _in_either_block(function, entries, *arguments):
    by_window, by_sample = lax.platform_dependent(
        *arguments,
        cpu=functools.partial(_in_blocks, function, entries[0]),
        default=functools.partial(_in_blocks, function, entries[1]),
    )
    return by_window, jax.tree.map(lambda total: total.sum(0), by_sample)


def _in_blocks(function, entries, bias, windowed, regions):
    """Take so many windows at a time that their weights have at most `entries`.

    Sums stay apart by sample, so by device.
    """
    w, n, h = windowed[0].shape[1:4]
    fitting = [size for size in range(1, w + 1) if w % size == 0]
    block = max((size for size in fitting if size * h * n * n <= entries), default=1)
    if block == w:
        return function(bias, windowed, regions)

    def cut(x, index, axis):
        return lax.dynamic_slice_in_dim(x, index * block, block, axis)

    def paste(whole, part, index):
        return lax.dynamic_update_slice_in_dim(whole, part, index * block, 1)

    def step(index, found):
        part = [cut(x, index, 1) for x in windowed]
        kept = None if regions is None else cut(regions, index, 0)
        by_window, by_sample = function(bias, part, kept)
        return (
            jax.tree.map(functools.partial(paste, index=index), found[0], by_window),
            jax.tree.map(jnp.add, found[1], by_sample),
        )

    by_window, by_sample = jax.eval_shape(function, bias, windowed, regions)
    # Made of an operand: XLA makes constants at the start of the program.
    born = windowed[0][:, :1, :1, :1, :1]
    buffers = jax.tree.map(
        lambda a: jnp.broadcast_to(born.astype(a.dtype), a.shape), by_window
    )
    zeros = jax.tree.map(
        lambda a: jnp.zeros_like(windowed[0], a.dtype, a.shape), by_sample
    )
    return lax.fori_loop(0, w // block, step, (buffers, zeros))
