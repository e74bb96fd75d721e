"""Softmax attention that never holds more than a block of its matrix.

Forward it is the online softmax (Milakov and Gimelshein 2018), backward it recomputes
each block from the saved maxima and sums, as FlashAttention does (Dao et al. 2022).

Axes: b batch, q queries, k keys, c channels, v channels of the values.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

Block = tuple[int, int]  # queries and keys of a block of the matrix
IN_FLOAT32 = {"preferred_element_type": jnp.float32}
EXACT = lax.Precision.HIGHEST
# Three products of what bfloat16 keeps of float32 and of what it drops: errs by 3e-4 of
# the logits' norm where bfloat16 alone errs by 1e-2, in less time than EXACT on a GPU.
BY_PARTS = lax.DotAlgorithmPreset.BF16_BF16_F32_X3
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
        """Weight of the key of the largest logit, [B, Q]."""
        return 1 / self.total

    def entropy(self, mean_logit: jax.Array) -> jax.Array:
        """Entropy of the weights, given their average of the logits, [B, Q].

        That is logsumexp(logits) - mean_logit, and 0 where large logits make the
        difference a rounding below 0.
        """
        return jnp.maximum(self.largest - mean_logit + jnp.log(self.total), 0)


def logits_of(
    queries: jax.Array, keys: jax.Array, precision: lax.PrecisionLike = EXACT
) -> jax.Array:
    """Inner products [B, Q, K] of [B, Q, C] and [B, K, C], in full float32.

    The magnitude of Soft MoE's reaches C: rounding the operands to bfloat16 would move
    them by tenths, and the softmax by tens of percent. `precision` may be `BY_PARTS`.
    """
    return jnp.einsum(
        "bqc,bkc->bqk",
        queries.astype(jnp.float32),
        keys.astype(jnp.float32),
        precision=precision,
    )


def average(
    block: Block,
    queries: jax.Array,
    keys: jax.Array,
    values: jax.Array,
    *,
    precision: lax.PrecisionLike = EXACT,
) -> tuple[jax.Array, Softmax]:
    """Average the values with the weights softmax over keys of (queries . keys).

    For each block of queries, one pass over the blocks of keys. The logits are not
    scaled. Products with values take operands in the values' dtype and add up in
    float32. Memory grows with Q + K.

    Args:
        block: queries and keys of a block.
        queries: [B, Q, C].
        keys: [B, K, C].
        values: [B, K, V].
        precision: of the logits, see `logits_of`.

    Returns:
        float32 [B, Q, V], and the softmax.
    """
    q = queries.shape[1]
    query_block, key_block = _fit(block, q, keys.shape[1])
    columns = _key_blocks(keys, values, key_block)

    def of_queries(rows):
        def add_keys(carry, columns):
            largest, total, out = carry
            key, value, exists = columns
            logits = _where(exists, logits_of(rows, key, precision), LOWEST)
            new = jnp.maximum(largest, logits.max(-1))
            weights = jnp.exp(logits - new[..., None])
            shrink = jnp.exp(largest - new)
            out = out * shrink[..., None] + _product("bqk,bkv->bqv", weights, value)
            return (new, total * shrink + weights.sum(-1), out), None

        zeros = jnp.zeros_like(rows[..., 0], jnp.float32)  # varies as the rows do
        out = jnp.broadcast_to(zeros[..., None], (*zeros.shape, values.shape[-1]))
        start = (jnp.full_like(zeros, LOWEST), zeros, out)
        (largest, total, out), _ = lax.scan(add_keys, start, columns)
        return out / total[..., None], largest, total

    found = lax.map(of_queries, _split(queries, query_block))
    out, *softmax = (_join(a, q) for a in found)
    return out, Softmax(*softmax)


def forward(
    block: Block,
    queries: jax.Array,
    keys: jax.Array,
    values: jax.Array,
    *,
    precision: lax.PrecisionLike = EXACT,
) -> tuple[jax.Array, tuple[jax.Array, Softmax]]:
    """Return the `average` in the values' dtype, and what `backward` needs."""
    out, softmax = average(block, queries, keys, values, precision=precision)
    out = out.astype(values.dtype)
    return out, (out, softmax)


def backward(
    block: Block,
    operands: tuple[jax.Array, jax.Array, jax.Array],
    kept: tuple[jax.Array, Softmax],
    cotangent: jax.Array,
    *,
    precision: lax.PrecisionLike = EXACT,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Return the gradients of `forward` in queries, keys and values.

    For each block of keys, one pass over the blocks of queries. With weights p,
    cotangent g and their inner product with the output, d = g . out, the gradient of
    the logits is p (g . value - d). The queries' gradient is added up over the passes.
    The other two accumulate transposed, [B, C, K], so no large operand has to be
    transposed: that costs a CPU more than twice the time.
    """
    queries, keys, values = operands
    out, softmax = kept
    q, k = queries.shape[1], keys.shape[1]
    query_block, key_block = _fit(block, q, k)
    mean = jnp.sum(cotangent.astype(jnp.float32) * out.astype(jnp.float32), -1)
    g = cotangent.astype(values.dtype)
    # Padded queries have an inverse of 0, so they weigh nothing.
    per_query = (queries, g, mean, softmax.largest, 1 / softmax.total)
    rows = tuple(_split(a, query_block) for a in per_query)

    def of_keys(query_gradients, columns):
        key, value, exists = columns

        def add_queries(carry, row):
            key_gradient, value_gradient = carry
            query, g, mean, largest, inverse, query_gradient = row
            weights = jnp.exp(logits_of(query, key, precision) - largest[..., None])
            weights = _where(exists, weights * inverse[..., None], 0)
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

    query_gradients, (key_gradients, value_gradients) = lax.scan(
        of_keys,
        jnp.zeros_like(rows[0], jnp.float32),
        _key_blocks(keys, values, key_block),
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


def _fit(block, queries, keys):
    """Shrink a block to the axes, in equal parts, so that little of it is padding."""
    return tuple(
        -(-n // -(-n // size)) for n, size in zip((queries, keys), block, strict=True)
    )


def _key_blocks(keys, values, size):
    """Blocks of keys, of values, and of masks that exclude padding."""
    k = keys.shape[1]
    exists = (jnp.arange(k + -k % size) < k).reshape(-1, size) if k % size else None
    return _split(keys, size), _split(values, size), exists


def _where(exists, values, otherwise):
    """Replace the columns of keys that are padding; None says that none are."""
    return values if exists is None else jnp.where(exists, values, otherwise)


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
