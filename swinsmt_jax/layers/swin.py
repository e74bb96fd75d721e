"""The shifted-window transformer block (Liu et al. 2021), in 3-D."""

from typing import Any

import jax
from flax import nnx

from swinsmt_jax.layers.attention import PositionIndex, WindowAttention
from swinsmt_jax.layers.linear import MLP, LayerNorm, drop_path, fold_in
from swinsmt_jax.layers.soft_moe import Routing, SoftMoE
from swinsmt_jax.ops import windows


class SwinBlock(nnx.Module):
    """Window attention and an MLP or Soft MoE, each normed before and added.

    Args:
        channels: C.
        num_heads: attention heads.
        window_size: (D, H, W) in tokens.
        shift: (D, H, W) in tokens, zeros for a block that does not shift.
        mlp: the MLP or Soft MoE; a Soft MoE sees the whole token grid at once.
        qkv_bias, dropout_rate, attention_dropout, drop_path_rate: see the config.
        position_index: see `WindowAttention`.
        dtype: of the matrix products.
        rngs: initialises the parameters.
    """

    def __init__(
        self,
        channels: int,
        *,
        num_heads: int,
        window_size: windows.Triple,
        shift: windows.Triple,
        mlp: MLP | SoftMoE,
        qkv_bias: bool = True,
        dropout_rate: float = 0.0,
        attention_dropout: float = 0.0,
        drop_path_rate: float = 0.0,
        position_index: PositionIndex = windows.relative_position_index,
        dtype: str = "float32",
        rngs: nnx.Rngs,
    ):
        self.window_size = window_size
        self.shift = shift
        self.drop_path_rate = drop_path_rate
        self.norm1 = LayerNorm(channels, dtype=dtype)
        self.attn = WindowAttention(
            channels,
            num_heads=num_heads,
            window_size=window_size,
            qkv_bias=qkv_bias,
            attention_dropout=attention_dropout,
            projection_dropout=dropout_rate,
            position_index=position_index,
            dtype=dtype,
            rngs=rngs,
        )
        self.norm2 = LayerNorm(channels, dtype=dtype)
        self.mlp = mlp

    def attend(self, x: jax.Array, *, key: jax.Array | None = None) -> jax.Array:
        """Return the attention branch of [B, D, H, W, C]."""
        d, h, w = grid = x.shape[1:4]
        window, shift = windows.fit_window(grid, self.window_size, self.shift)
        x = windows.pad(self.norm1(x), window)
        padded = x.shape[1:4]
        x = windows.partition(windows.cyclic_shift(x, shift), window)
        regions = windows.shift_regions(padded, window, shift) if any(shift) else None
        x = self.attn(x, regions=regions, key=key)
        x = windows.merge(x, window, padded)
        x = windows.cyclic_shift(x, tuple(-s for s in shift))
        return x[:, :d, :h, :w]

    def __call__(
        self,
        x: jax.Array,
        *,
        key: jax.Array | None = None,
        return_routing: bool | str = False,
    ) -> tuple[jax.Array, Routing | None]:
        """Map [B, D, H, W, C] to the same shape, with its routing on request."""
        keys = [fold_in(key, i) for i in range(4)]
        rate = self.drop_path_rate
        with jax.named_scope("attention"):
            y = self.attend(x, key=keys[0])
        x = x + drop_path(y, rate=rate, key=keys[1])
        routing = None
        if isinstance(self.mlp, SoftMoE):
            with jax.named_scope("soft_moe"):
                tokens = self.norm2(x).reshape(x.shape[0], -1, x.shape[-1])
                found: Any = self.mlp(
                    tokens, key=keys[2], return_routing=return_routing
                )
                y, routing = found if return_routing else (found, None)
            y = y.reshape(x.shape)
        else:
            with jax.named_scope("mlp"):
                y = self.mlp(self.norm2(x), key=keys[2])
        return x + drop_path(y, rate=rate, key=keys[3]), routing
