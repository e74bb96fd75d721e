"""Multi-head self-attention within windows, with relative-position bias."""

import jax
import jax.numpy as jnp
from flax import nnx

from swinsmt_jax.layers import initializers
from swinsmt_jax.layers.linear import Linear, dropout, fold_in
from swinsmt_jax.ops import windows


class WindowAttention(nnx.Module):
    """Self-attention of the tokens of each window (Liu et al. 2021).

    Args:
        channels: C, a multiple of the heads.
        num_heads: h.
        window_size: full window (D, H, W) in tokens, for which the table is made.
        qkv_bias: whether queries, keys and values have a bias.
        attention_dropout, projection_dropout: rates.
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
        dtype: str = "float32",
        rngs: nnx.Rngs,
    ):
        self.num_heads = num_heads
        self.window_size = window_size
        self.attention_dropout = attention_dropout
        self.projection_dropout = projection_dropout
        self.dtype = dtype
        self.qkv = Linear(
            channels, 3 * channels, use_bias=qkv_bias, dtype=dtype, rngs=rngs
        )
        self.proj = Linear(channels, channels, dtype=dtype, rngs=rngs)
        d, h, w = window_size
        offsets = (2 * d - 1) * (2 * h - 1) * (2 * w - 1)
        self.relative_position_bias_table = initializers.truncated_normal(
            rngs, (offsets, num_heads), stddev=0.02
        )

    def position_bias(self, tokens: int) -> jax.Array:
        """Bias [h, n, n] of the first n tokens of a full window.

        For a window that shrank to n tokens this is not their true relative position:
        the published network indexes so, and pretrained weights rely on it.
        """
        index = windows.relative_position_index(self.window_size)[:tokens, :tokens]
        table = self.relative_position_bias_table[...]
        bias = table[index.reshape(-1)].reshape(tokens, tokens, self.num_heads)
        return bias.transpose(2, 0, 1)

    def __call__(
        self, x: jax.Array, *, regions=None, key: jax.Array | None = None
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
        q = q * (c // self.num_heads) ** -0.5
        logits = jnp.einsum(
            "bwihc,bwjhc->bwhij", q, k, preferred_element_type=jnp.float32
        )
        logits = logits + self.position_bias(n)
        if regions is not None:
            regions = jnp.asarray(regions)
            apart = regions[:, None, :, None] != regions[:, None, None, :]
            logits = logits + jnp.where(apart, windows.DIFFERENT_REGION, 0.0)
        weights = jax.nn.softmax(logits, axis=-1)
        weights = dropout(weights, rate=self.attention_dropout, key=fold_in(key, 0))
        y = jnp.einsum("bwhij,bwjhc->bwihc", weights.astype(self.dtype), v)
        y = self.proj(y.reshape(b, w, n, c))
        return dropout(y, rate=self.projection_dropout, key=fold_in(key, 1))
