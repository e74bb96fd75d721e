"""Softmax attention that never holds more than a block of its matrix.

Forward it is the online softmax (Milakov and Gimelshein 2018), backward it recomputes
each block from the saved maxima and sums, as FlashAttention does (Dao et al. 2022).

Axes: b batch, q queries, k keys, c channels, v channels of the values.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from swinsmt_jax.ops.manual_axes import vary_alike
from swinsmt_jax.ops.tracing import traced_once

# Queries and keys of a block. A CPU wants it in its cache, an accelerator wants few
# and large matrix products; benchmarks/soft_moe.py measures.
CPU_BLOCK = (512, 1024)
ACCELERATOR_BLOCK = (4096, 4096)
IN_FLOAT32 = {"preferred_element_type": jnp.float32}
LOWEST = -1e30  # below every logit; finite, so that a difference of two is not NaN


class Softmax(NamedTuple):
    """The softmax of each query over the keys, without its entries.

    Attributes:
        largest: greatest logit of each query, float32 [B, Q].
        total: sum of exp(logit - largest) over the keys, float32 [B, Q].
    """

    largest: jax.Array
    total: jax.Array

    def greatest_weight(self) -> jax.Array:
        """Weight of the key of the largest logit, and 0 without keys, [B, Q]."""
        return _inverse(self.total)

    def entropy(self, mean_logit: jax.Array) -> jax.Array:
        """Entropy of the weights, given their average of the logits, [B, Q].

        That is logsumexp(logits) - mean_logit. Where large logits make the difference
        a rounding below 0, and for a query without keys, it is 0.
        """
        entropy = self.largest - mean_logit + jnp.log(jnp.maximum(self.total, 1))
        return jnp.where(self.total > 0, jnp.maximum(entropy, 0), 0)


def attend(
    queries: jax.Array,
    keys: jax.Array,
    values: jax.Array,
    *,
    key_mask: jax.Array | None = None,
) -> jax.Array:
    """Average the values with the weights softmax over keys of (queries . keys).

    The logits are not scaled, and are float32 in full precision whatever the operands.
    Products with values take operands in the values' dtype and add up in float32.
    Memory grows with Q + K, forward and backward.

    Args:
        queries: [B, Q, C].
        keys: [B, K, C].
        values: [B, K, V].
        key_mask: bool [B, K]; keys that are False get no weight. A query all of whose
            keys are masked gets zeros.

    Returns:
        [B, Q, V] in the values' dtype.
    """
    return _attend(*vary_alike(queries, keys, values, key_mask))


def attend_with_softmax(queries, keys, values, *, key_mask=None):
    """Return `attend`'s averages, in float32, and the `Softmax`; not differentiable."""
    operands = vary_alike(queries, keys, values, key_mask)
    out, softmax = _on_each_platform(_forward, *operands)
    return lax.stop_gradient(out), lax.stop_gradient(softmax)


def logits_of(queries: jax.Array, keys: jax.Array) -> jax.Array:
    """Inner products [B, Q, K] of [B, Q, C] and [B, K, C], in full float32.

    The magnitude of Soft MoE's reaches C: rounding the operands to bfloat16 would move
    them by tenths, and the softmax by tens of percent.
    """
    return jnp.einsum(
        "bqc,bkc->bqk",
        queries.astype(jnp.float32),
        keys.astype(jnp.float32),
        precision=lax.Precision.HIGHEST,
    )


@jax.custom_vjp
def _attend(queries, keys, values, key_mask):
    return _attend_forward(queries, keys, values, key_mask)[0]


def _attend_forward(queries, keys, values, key_mask):
    out, softmax = _on_each_platform(_forward, queries, keys, values, key_mask)
    out = out.astype(values.dtype)
    return out, (queries, keys, values, key_mask, out, softmax)


def _attend_backward(saved, cotangent):
    return *_on_each_platform(_backward, *saved, cotangent), None


_attend.defvjp(_attend_forward, _attend_backward)


def _on_each_platform(function, *arguments):
    """Call with the block of the platform that the program is lowered for."""
    return _in_either_block(function, (CPU_BLOCK, ACCELERATOR_BLOCK), *arguments)


@functools.partial(traced_once, static_argnums=(0, 1))
def _in_either_block(function, blocks, *arguments):
    return lax.platform_dependent(
        *arguments,
        cpu=functools.partial(function, blocks[0]),
        default=functools.partial(function, blocks[1]),
    )


def _forward(block, queries, keys, values, key_mask):
    """For each block of queries, one pass over the blocks of keys."""
    b, q, _ = queries.shape
    query_block, key_block = _fit(block, q, keys.shape[1])
    key_blocks = _key_blocks(keys, values, key_mask, key_block)

    def of_queries(rows):
        def add_keys(carry, columns):
            largest, total, out = carry
            key, value, kept = columns
            logits = logits_of(rows, key)
            if kept is not None:
                logits = jnp.where(kept[:, None], logits, LOWEST)
            new = jnp.maximum(largest, logits.max(-1))
            weights = jnp.exp(logits - new[..., None])
            if kept is not None:
                weights = jnp.where(kept[:, None], weights, 0)
            shrink = jnp.exp(largest - new)
            out = out * shrink[..., None] + _product("bqk,bkv->bqv", weights, value)
            return (new, total * shrink + weights.sum(-1), out), None

        zeros = jnp.zeros_like(rows[..., 0], jnp.float32)  # varies as the rows do
        out = jnp.broadcast_to(zeros[..., None], (*zeros.shape, values.shape[-1]))
        start = (jnp.full_like(zeros, LOWEST), zeros, out)
        (largest, total, out), _ = lax.scan(add_keys, start, key_blocks)
        return out * _inverse(total)[..., None], largest, total

    rows = _split(queries, query_block)
    out, largest, total = lax.map(of_queries, rows)
    return _join(out, q), Softmax(_join(largest, q), _join(total, q))


def _backward(block, queries, keys, values, key_mask, out, softmax, cotangent):
    """For each block of keys, one pass over the blocks of queries.

    With weights p, cotangent g and their inner product with the output, d = g . out,
    the gradient of the logits is p (g . value - d). The queries' gradient is added up
    over the passes. The other two are transposed, [B, C, K], so that the large operand
    of no product is: that costs a CPU more than twice the time.
    """
    q, k = queries.shape[1], keys.shape[1]
    query_block, key_block = _fit(block, q, k)
    mean = jnp.sum(cotangent.astype(jnp.float32) * out.astype(jnp.float32), -1)
    per_query = (queries, cotangent.astype(values.dtype), mean, *softmax)
    query, g, mean, largest, total = (_split(a, query_block) for a in per_query)
    rows = (query, g, mean, largest, _inverse(total))

    def of_keys(query_gradients, columns):
        key, value, kept = columns

        def add_queries(carry, row):
            key_gradient, value_gradient = carry
            query, g, mean, largest, inverse, query_gradient = row
            logits = logits_of(query, key)
            weights = jnp.exp(logits - largest[..., None]) * inverse[..., None]
            if kept is not None:
                weights = jnp.where(kept[:, None], weights, 0)
            value_gradient += _product("bqv,bqk->bvk", g, weights)
            slope = jnp.einsum("bqv,bkv->bqk", g, value, **IN_FLOAT32)
            slope = (weights * (slope - mean[..., None])).astype(values.dtype)
            key_gradient += _product("bqc,bqk->bck", query, slope)
            query_gradient += _product("bqk,bkc->bqc", slope, key)
            return (key_gradient, value_gradient), query_gradient

        start = tuple(
            jnp.zeros_like(jnp.swapaxes(a, 1, 2), jnp.float32) for a in (key, value)
        )
        gradients, query_gradients = lax.scan(
            add_queries, start, (*rows, query_gradients)
        )
        return query_gradients, tuple(jnp.swapaxes(a, 1, 2) for a in gradients)

    columns = _key_blocks(keys, values, key_mask, key_block)
    query_gradients, (key_gradients, value_gradients) = lax.scan(
        of_keys, jnp.zeros_like(query, jnp.float32), columns
    )
    return (
        _join(query_gradients, q).astype(queries.dtype),
        _join(key_gradients, k).astype(keys.dtype),
        _join(value_gradients, k).astype(values.dtype),
    )


def _product(subscripts, a, b):
    """Multiply in the narrower dtype of the two, and add up in float32."""
    dtype = min(a.dtype, b.dtype, key=lambda d: d.itemsize)
    return jnp.einsum(subscripts, a.astype(dtype), b.astype(dtype), **IN_FLOAT32)


def _inverse(total):
    """1 / total, and 0 for a query whose keys are all masked."""
    return jnp.where(total > 0, 1 / jnp.where(total > 0, total, 1), 0)


def _fit(block, queries, keys):
    """Shrink a block to the axes, in equal parts, so that little of it is padding."""
    return tuple(
        -(-n // -(-n // size)) for n, size in zip((queries, keys), block, strict=True)
    )


def _key_blocks(keys, values, key_mask, size):
    """Blocks of keys, values and the mask; None for a mask that would keep all."""
    b, k, _ = keys.shape
    if key_mask is None and k % size:
        key_mask = jnp.ones((b, k), bool)
    mask = None if key_mask is None else _split(key_mask, size)
    return _split(keys, size), _split(values, size), mask


def _split(array, size):
    """[B, N, ...] -> [ceil(N / size), B, size, ...], padded with zeros."""
    b, n = array.shape[:2]
    count = -(-n // size)
    padding = ((0, 0), (0, count * size - n)) + ((0, 0),) * (array.ndim - 2)
    blocks = jnp.pad(array, padding).reshape(b, count, size, *array.shape[2:])
    return jnp.moveaxis(blocks, 1, 0)


def _join(blocks, n):
    """Inverse of `_split`: [blocks, B, size, ...] -> [B, N, ...]."""
    array = jnp.moveaxis(blocks, 0, 1)
    return array.reshape(array.shape[0], -1, *array.shape[3:])[:, :n]
