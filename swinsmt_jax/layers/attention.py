"""Multi-head self-attention: of all tokens, and within windows."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from swinsmt_jax.layers import initializers
from swinsmt_jax.layers.linear import dropout, fold_in, linear
from swinsmt_jax.ops import by_platform, window_attention, windows

PositionIndex = Callable[[windows.Triple], np.ndarray]


class SelfAttention(nnx.Module):
    """Self-attention of all tokens with one another (Dosovitskiy et al. 2021).

    Args:
        channels: C, a multiple of the heads.
        num_heads: h.
        qkv_bias: whether queries, keys and values have a bias.
        dropout_rate: on attention weights and after the projection.
        dtype: of the matrix products; the softmax is float32.
        rngs: initialises the parameters.
    """

    def __init__(
        self,
        channels: int,
        *,
        num_heads: int,
        qkv_bias: bool,
        dropout_rate: float = 0.0,
        dtype: str = "float32",
        rngs: nnx.Rngs,
    ):
        self.num_heads = num_heads
        self.dropout_rate = dropout_rate
        self.dtype = dtype
        self.qkv = linear(
            channels, 3 * channels, use_bias=qkv_bias, dtype=dtype, rngs=rngs
        )
        self.out_proj = linear(channels, channels, dtype=dtype, rngs=rngs)

    def __call__(self, x: jax.Array, *, key: jax.Array | None = None) -> jax.Array:
        """Map tokens [B, N, C] to [B, N, C]; the key switches dropout on."""
        b, n, c = x.shape
        qkv = self.qkv(x).reshape(b, n, 3, self.num_heads, c // self.num_heads)
        q, k, v = qkv[:, :, 0], qkv[:, :, 1], qkv[:, :, 2]
        q = q * (c // self.num_heads) ** -0.5
        logits = jnp.einsum("bihc,bjhc->bhij", q, k, preferred_element_type=jnp.float32)
        weights = jax.nn.softmax(logits, axis=-1)
        weights = dropout(weights, rate=self.dropout_rate, key=fold_in(key, 0))
        y = jnp.einsum("bhij,bjhc->bihc", weights.astype(self.dtype), v)
        y = self.out_proj(y.reshape(b, n, c))
        return dropout(y, rate=self.dropout_rate, key=fold_in(key, 1))


class PositionBias:
    """What attentions within windows have in common: the bias of relative positions."""

    window_size: windows.Triple
    position_index: PositionIndex
    relative_position_bias_table: nnx.Param

    def relative_position_index(self) -> np.ndarray:
        """Row of the table for every pair of tokens, int32 [n, n]."""
        return self.position_index(self.window_size)

    def position_bias(self, tokens: int) -> jax.Array:
        """Bias [h, n, n] of the first n tokens of a full window.

        For a window that shrank to n tokens this is not their true relative position:
        the published network indexes so, and pretrained weights rely on it.
        """
        index = self.relative_position_index()[:tokens, :tokens]
        rows = self.relative_position_bias_table[...][index.reshape(-1)]
        return rows.reshape(*index.shape, -1).transpose(2, 0, 1)


class WindowAttention(PositionBias, nnx.Module):
    """Self-attention of the tokens of each window (Liu et al. 2021).

    Args:
        channels: C, a multiple of the heads.
        num_heads: h.
        window_size: full window (D, H, W) in tokens, for which the table is made.
        qkv_bias: whether queries, keys and values have a bias.
        attention_dropout, projection_dropout: rates.
        position_index: window -> the table's row for every pair of its tokens.
        dtype: of the matrix products; the softmax is float32.
        rngs: initialises the parameters.
    """

    def __init__(
        self,
        channels: int,
        *,
        num_heads: int,
        window_size: windows.Triple,
        qkv_bias: bool = True,
        attention_dropout: float = 0.0,
        projection_dropout: float = 0.0,
        position_index: PositionIndex = windows.relative_position_index,
        dtype: str = "float32",
        rngs: nnx.Rngs,
    ):
        self.num_heads = num_heads
        self.window_size = window_size
        self.attention_dropout = attention_dropout
        self.projection_dropout = projection_dropout
        self.position_index = position_index
        self.dtype = dtype
        self.qkv = linear(
            channels, 3 * channels, use_bias=qkv_bias, dtype=dtype, rngs=rngs
        )
        self.proj = linear(channels, channels, dtype=dtype, rngs=rngs)
        self.relative_position_bias_table = _table(window_size, num_heads, rngs=rngs)

    def __call__(
        self,
        x: jax.Array,
        *,
        regions: np.ndarray | None = None,
        key: jax.Array | None = None,
    ) -> jax.Array:
        """Map windows [B, W, n, C] to [B, W, n, C].

        Args:
            x: tokens of each window.
            regions: int [W, n]; tokens of different numbers are kept apart.
            key: switches dropout on.
        """
        b, w, n, c = x.shape
        qkv = self.qkv(x).reshape(b, w, n, 3, self.num_heads, c // self.num_heads)
        q, k, v = qkv[..., 0, :, :], qkv[..., 1, :, :], qkv[..., 2, :, :]
        y = _attend(
            q,
            k,
            v,
            bias=self.position_bias(n),
            regions=regions,
            rate=self.attention_dropout,
            key=fold_in(key, 0),
        )
        y = self.proj(y.reshape(b, w, n, c))
        return dropout(y, rate=self.projection_dropout, key=fold_in(key, 1))


class SkipAttention(PositionBias, nnx.Module):
    """Attention of a window's tokens to those of the skip (Zhou et al. 2023).

    The queries are the tokens themselves, without a projection.

    Args:
        channels, num_heads, window_size, position_index, dtype, rngs: see
            `WindowAttention`.
    """

    def __init__(
        self,
        channels: int,
        *,
        num_heads: int,
        window_size: windows.Triple,
        position_index: PositionIndex = windows.relative_position_index,
        dtype: str = "float32",
        rngs: nnx.Rngs,
    ):
        self.num_heads = num_heads
        self.window_size = window_size
        self.position_index = position_index
        self.kv = linear(channels, 2 * channels, dtype=dtype, rngs=rngs)
        self.proj = linear(channels, channels, dtype=dtype, rngs=rngs)
        self.relative_position_bias_table = _table(window_size, num_heads, rngs=rngs)

    def __call__(self, x: jax.Array, skip: jax.Array) -> jax.Array:
        """Map windows of queries and of the skip, both [B, W, n, C], to the same."""
        b, w, n, c = x.shape
        heads = (self.num_heads, c // self.num_heads)
        kv = self.kv(skip).reshape(b, w, n, 2, *heads)
        y = _attend(
            x.reshape(b, w, n, *heads),
            kv[..., 0, :, :],
            kv[..., 1, :, :],
            bias=self.position_bias(n),
        )
        return self.proj(y.reshape(b, w, n, c))


def _table(window_size, num_heads, *, rngs):
    d, h, w = window_size
    offsets = (2 * d - 1) * (2 * h - 1) * (2 * w - 1)
    return initializers.truncated_normal(rngs, (offsets, num_heads), stddev=0.02)


def _attend(q, k, v, *, bias, regions=None, rate=0.0, key=None):
    """Attention within windows: q, k and v are [B, W, n, h, C / h]."""
    if not rate or key is None:
        return by_platform.attend_within_windows(q, k, v, bias, regions)
    by_platform.note("windows", "plain, for dropout", q.shape[1:])
    regions = None if regions is None else jnp.asarray(regions)
    weights = window_attention.weights(q, k, bias, regions)
    weights = dropout(weights, rate=rate, key=key)
    return window_attention.average(weights, v)
