"""Softmax attention within windows, whose weights are not kept for the backward pass.

Axes: b batch, w windows, i and j tokens of a window, h heads, c channels of a head.
"""

import jax
import jax.numpy as jnp
from jax import lax

from swinsmt_jax.ops import windows

IN_FLOAT32 = {"preferred_element_type": jnp.float32}


def weights(
    q: jax.Array, k: jax.Array, bias: jax.Array | None, regions: jax.Array | None
) -> jax.Array:
    """Return the attention weights, float32 [B, W, h, n, n].

    Args:
        q, k: [B, W, n, h, c]; the queries are scaled by 1 / sqrt(c).
        bias: [h, n, n], added to the logits; None for none.
        regions: int [W, n]; tokens of different numbers are kept apart.
    """
    q = q * q.shape[-1] ** -0.5
    logits = jnp.einsum("bwihc,bwjhc->bwhij", q, k, **IN_FLOAT32)
    # else XLA writes the bias once for each window, to hand it to cuBLAS's product
    logits = logits if bias is None else lax.optimization_barrier(logits) + bias
    if regions is not None:
        apart = regions[:, None, :, None] != regions[:, None, None, :]
        logits = logits + jnp.where(apart, windows.DIFFERENT_REGION, 0.0)
    return jax.nn.softmax(logits, axis=-1)


def average(weights: jax.Array, v: jax.Array) -> jax.Array:
    """Average values [B, W, n, h, c] with weights [B, W, h, n, n], in their dtype."""
    return jnp.einsum("bwhij,bwjhc->bwihc", weights.astype(v.dtype), v)


def forward(
    entries: int,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    bias: jax.Array | None,
    regions: jax.Array | None,
) -> tuple[jax.Array, tuple[()]]:
    """Average the values of each window with `weights`, some windows at a time.

    Args:
        entries: of the weights of one sample that are made at a time.
        q, k, v: [B, W, n, h, c].
        bias: [h, n, n], or None.
        regions: int [W, n], or None.

    Returns:
        [B, W, n, h, c] in the values' dtype; `backward` needs nothing more.
    """

    def of_windows(q, k, v, regions):
        return average(weights(q, k, bias, regions), v), ()

    return _in_blocks(of_windows, entries, (q, k, v), regions)[0], ()


def backward(entries: int, operands: tuple, _: tuple, cotangent: jax.Array) -> tuple:
    """Return the gradients of `forward`, making the weights again.

    With weights p and cotangent g, the logits' slope is p (g . v - sum p g . v).
    """
    q, k, v, bias, regions = operands

    def of_windows(q, k, v, g, regions):
        p = weights(q, k, bias, regions)
        dv = jnp.einsum("bwhij,bwihc->bwjhc", p.astype(v.dtype), g)
        slope = jnp.einsum("bwihc,bwjhc->bwhij", g, v, **IN_FLOAT32)
        slope = p * (slope - jnp.sum(p * slope, axis=-1, keepdims=True))
        dbias = None if bias is None else slope.sum(1)
        slope = slope.astype(q.dtype)
        scale = q.shape[-1] ** -0.5
        dq = jnp.einsum("bwhij,bwjhc->bwihc", slope, k) * scale
        dk = jnp.einsum("bwhij,bwihc->bwjhc", slope, q) * scale
        return (dq, dk, dv), dbias

    by_window, dbias = _in_blocks(of_windows, entries, (q, k, v, cotangent), regions)
    if bias is not None:
        dbias = dbias.sum(0).astype(bias.dtype)
    return *by_window, dbias, None


def _in_blocks(function, entries, windowed, regions):
    """Call with so many windows at a time that their weights have at most `entries`.

    Returns the function's results by window, and sums over the windows of its results
    by sample. Those stay apart by sample, so by device.
    """
    w, n, h = windowed[0].shape[1:4]
    fitting = [size for size in range(1, w + 1) if w % size == 0]
    block = max((size for size in fitting if size * h * n * n <= entries), default=1)
    if block == w:
        return function(*windowed, regions)

    def step(index, found):
        def cut(x, axis):
            return lax.dynamic_slice_in_dim(x, index * block, block, axis)

        def paste(whole, part):
            return lax.dynamic_update_slice_in_dim(whole, part, index * block, 1)

        here = None if regions is None else cut(regions, 0)
        by_window, by_sample = function(*(cut(x, 1) for x in windowed), here)
        return (
            jax.tree.map(paste, found[0], by_window),
            jax.tree.map(jnp.add, found[1], by_sample),
        )

    by_window, by_sample = jax.eval_shape(function, *windowed, regions)
    # Made of an operand: XLA makes constants at the start of the program.
    born = windowed[0][:, :1, :1, :1, :1]
    buffers = jax.tree.map(
        lambda a: jnp.broadcast_to(born.astype(a.dtype), a.shape), by_window
    )
    zeros = jax.tree.map(
        lambda a: jnp.zeros_like(windowed[0], a.dtype, a.shape), by_sample
    )
    return lax.fori_loop(0, w // block, step, (buffers, zeros))
