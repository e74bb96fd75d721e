"""Swin UNETR (Hatamizadeh et al. 2022) and Swin SMT (Plotka et al., MICCAI 2024).

Both are one network: a Swin transformer encoder and a convolutional decoder. Swin SMT
has Soft Mixture-of-Experts instead of the MLPs of its last stages.
"""

from typing import overload

import jax
import jax.numpy as jnp
from flax import nnx

from swinsmt_jax.layers.conv import Conv, ResidualBlock, UpBlock
from swinsmt_jax.layers.recompute import maybe_remat
from swinsmt_jax.layers.soft_moe import Routing
from swinsmt_jax.models.network import Network, dropout_key
from swinsmt_jax.models.swin.config import SwinUNETRConfig
from swinsmt_jax.models.swin.encoder import SwinTransformer


class SwinBackbone(Network):
    """Swin UNETR without its last layer, or Swin SMT if the config has experts."""

    def __init__(self, config: SwinUNETRConfig, *, rngs: nnx.Rngs):
        super().__init__(config)
        f = config.feature_size
        common: dict = {"dtype": config.dtype, "rngs": rngs}
        self.swinViT = SwinTransformer(config, rngs=rngs)
        self.encoder1 = ResidualBlock(config.in_channels, f, **common)
        self.encoder2 = ResidualBlock(f, f, **common)
        self.encoder3 = ResidualBlock(2 * f, 2 * f, **common)
        self.encoder4 = ResidualBlock(4 * f, 4 * f, **common)
        self.encoder10 = ResidualBlock(16 * f, 16 * f, **common)
        self.decoder5 = UpBlock(16 * f, 8 * f, **common)
        self.decoder4 = UpBlock(8 * f, 4 * f, **common)
        self.decoder3 = UpBlock(4 * f, 2 * f, **common)
        self.decoder2 = UpBlock(2 * f, f, **common)
        self.decoder1 = UpBlock(f, f, **common)

    def hidden_states(
        self, x: jax.Array, *, rngs: nnx.Rngs | None = None
    ) -> list[jax.Array]:
        """Return the encoder's five hidden states of [B, D, H, W, C_in]."""
        self.check_input(x)
        return self.swinViT(x, key=dropout_key(rngs))[0]

    def ends(
        self,
        x: jax.Array,
        *,
        rngs: nnx.Rngs | None = None,
        return_routing: bool | str = False,
    ) -> tuple[jax.Array, jax.Array, dict[str, Routing]]:
        """Return the results of decoder and encoder, and the routing weights.

        They are [B, D, H, W, feature_size] and, at the bottom, [B, D / 32, H / 32, W /
        32, 16 feature_size].
        """
        self.check_input(x)
        hidden, routing = self.swinViT(
            x, key=dropout_key(rngs), return_routing=return_routing
        )
        run = maybe_remat("encoder" in self.config.remat)
        with jax.named_scope("encoder"):
            skips = [
                run(self.encoder1, x),
                run(self.encoder2, hidden[0]),
                run(self.encoder3, hidden[1]),
                run(self.encoder4, hidden[2]),
                hidden[3],
            ]
            y = bottom = run(self.encoder10, hidden[4])
        run = maybe_remat("decoder" in self.config.remat)
        for level in (5, 4, 3, 2, 1):
            with jax.named_scope(f"decoder{level}"):
                y = run(getattr(self, f"decoder{level}"), y, skips[level - 1])
        return y, bottom, routing


class SwinUNETR(SwinBackbone):
    """Swin UNETR, or Swin SMT if the config has experts."""

    def __init__(self, config: SwinUNETRConfig, *, rngs: nnx.Rngs):
        super().__init__(config, rngs=rngs)
        self.out = Conv(
            config.feature_size,
            config.out_channels,
            kernel_size=1,
            use_bias=True,
            dtype=config.dtype,
            rngs=rngs,
        )

    @overload
    def __call__(self, x: jax.Array, *, rngs: nnx.Rngs | None = None) -> jax.Array: ...

    @overload
    def __call__(
        self, x: jax.Array, *, rngs: nnx.Rngs | None = None, return_routing: bool | str
    ) -> tuple[jax.Array, dict[str, Routing]]: ...

    def __call__(
        self,
        x: jax.Array,
        *,
        rngs: nnx.Rngs | None = None,
        return_routing: bool | str = False,
    ) -> jax.Array | tuple[jax.Array, dict[str, Routing]]:
        """Segment a batch of volumes, as `Network` does.

        Args:
            x, rngs: see `Network`.
            return_routing: True also returns the dispatch and combine weights of every
                Soft MoE, under names such as "stage2/block0": N x N matrices, for which
                the routing is dense. "statistics" returns `RoutingStatistics`, for
                which no such matrix is made.
        """
        y, _, routing = self.ends(x, rngs=rngs, return_routing=return_routing)
        with jax.named_scope("head"):
            logits = self.head(y).astype(jnp.float32)
        return (logits, routing) if return_routing else logits

    def features(self, x: jax.Array, *, rngs: nnx.Rngs | None = None) -> jax.Array:
        """Return what the head is applied to, [B, D, H, W, feature_size]."""
        return self.ends(x, rngs=rngs)[0]
