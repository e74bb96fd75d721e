"""Patch embedding and the three forms of patch merging."""

import itertools

import jax
import jax.numpy as jnp
from flax import nnx

from swinsmt_jax.layers.conv import PatchConv
from swinsmt_jax.layers.linear import LayerNorm, linear

# Offsets (d, h, w) of the eight octants, in the order of their concatenation.
OCTANTS = {
    # MONAI v0.9.0 and the published Swin SMT: two octants twice, two never.
    "legacy": ("000", "100", "010", "001", "101", "010", "001", "111"),
    "octants": ("000", "100", "010", "001", "110", "101", "011", "111"),
    "octants_v2": tuple("".join(o) for o in itertools.product("01", repeat=3)),
}


class PatchEmbed(nnx.Module):
    """Embed patches of 2 x 2 x 2 voxels: [B, D, H, W, C] -> [B, D/2, H/2, W/2, O]."""

    def __init__(
        self,
        channels: int,
        features: int,
        *,
        norm: bool = False,
        dtype: str = "float32",
        rngs: nnx.Rngs,
    ):
        self.proj = PatchConv(channels, features, patch_size=2, dtype=dtype, rngs=rngs)
        self.norm = LayerNorm(features, dtype=dtype) if norm else None

    def __call__(self, x: jax.Array) -> jax.Array:
        """Return the tokens of the patches."""
        x = self.proj(x)
        return x if self.norm is None else self.norm(x)


class PatchMerging(nnx.Module):
    """Halve the token grid: concatenate eight octants, norm, project 8 C -> 2 C."""

    def __init__(
        self, channels: int, *, mode: str, dtype: str = "float32", rngs: nnx.Rngs
    ):
        self.mode = mode
        self.norm = LayerNorm(8 * channels, dtype=dtype)
        self.reduction = linear(
            8 * channels, 2 * channels, use_bias=False, dtype=dtype, rngs=rngs
        )

    def __call__(self, x: jax.Array) -> jax.Array:
        """Map [B, D, H, W, C] to [B, D/2, H/2, W/2, 2C]; odd sides are padded."""
        x = jnp.pad(x, ((0, 0), *((0, n % 2) for n in x.shape[1:4]), (0, 0)))
        octants = [
            x[:, int(o[0]) :: 2, int(o[1]) :: 2, int(o[2]) :: 2]
            for o in OCTANTS[self.mode]
        ]
        return self.reduction(self.norm(jnp.concatenate(octants, axis=-1)))
