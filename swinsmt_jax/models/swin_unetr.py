"""Swin UNETR (Hatamizadeh et al. 2022) and Swin SMT (Plotka et al., MICCAI 2024).

Both are one network: a Swin transformer encoder and a convolutional decoder. Swin SMT
has Soft Mixture-of-Experts instead of the MLPs of its last stages.
"""

import jax
import jax.numpy as jnp
from flax import nnx

from swinsmt_jax import checks
from swinsmt_jax.layers.conv import Conv, ResidualBlock, UpBlock
from swinsmt_jax.layers.linear import dropout, fold_in
from swinsmt_jax.layers.patch import PatchEmbed
from swinsmt_jax.layers.soft_moe import Routing
from swinsmt_jax.layers.swin import SwinStage
from swinsmt_jax.ops.normalization import standardize
from swinsmt_jax.swin_config import STAGES, SwinUNETRConfig


class SwinTransformer(nnx.Module):
    """The encoder: patch embedding and four stages, five hidden states.

    Stage i (1-based) is `layers{i}`; with `residual_conv` a block `layers{i}c` comes
    before it. The names are PyTorch's.
    """

    def __init__(self, config: SwinUNETRConfig, *, rngs: nnx.Rngs):
        self.config = config
        self.patch_embed = PatchEmbed(
            config.in_channels,
            config.feature_size,
            norm=config.patch_norm,
            dtype=config.dtype,
            rngs=rngs,
        )
        for i in range(len(STAGES)):
            channels = config.feature_size * 2**i
            block = None
            if config.residual_conv:
                block = ResidualBlock(channels, channels, dtype=config.dtype, rngs=rngs)
            setattr(self, f"layers{i + 1}c", block)
            setattr(self, f"layers{i + 1}", SwinStage(config, stage=i, rngs=rngs))

    def __call__(
        self,
        x: jax.Array,
        *,
        key: jax.Array | None = None,
        return_routing: bool | str = False,
    ) -> tuple[list[jax.Array], Routing]:
        """Return five hidden states of [B, D, H, W, C_in], and the routing weights.

        Hidden state i has feature_size * 2^i channels on the grid D / 2^(i+1).
        """
        with jax.named_scope("patch_embed"):
            x = self.patch_embed(x)
            x = dropout(x, rate=self.config.dropout, key=fold_in(key, 0))
        hidden, routing = [self._normalized(x)], {}
        for i, name in enumerate(STAGES):
            stage = getattr(self, f"layers{i + 1}")
            before = getattr(self, f"layers{i + 1}c")

            def run(before, stage, x, key):
                x = x if before is None else before(x)
                return stage(x, key=key, return_routing=return_routing)

            if name in self.config.remat:
                run = nnx.remat(run)
            with jax.named_scope(name):
                x, weights = run(before, stage, x, fold_in(key, i + 1))
            for block, weight in enumerate(weights):
                if weight is not None:
                    routing[f"{name}/block{block}"] = weight
            hidden.append(self._normalized(x))
        return hidden, routing

    def _normalized(self, x):
        if not self.config.normalize:
            return x
        return standardize(x, (x.ndim - 1,)).astype(x.dtype)


class SwinUNETR(nnx.Module):
    """Swin UNETR or Swin SMT, as the type of the config says.

    Args:
        config: `SwinUNETRConfig` or `SwinSMTConfig`.
        rngs: initialises the parameters, in float32.
    """

    def __init__(self, config: SwinUNETRConfig, *, rngs: nnx.Rngs):
        self.config = config
        self.total_stride = config.total_stride
        f, dtype = config.feature_size, config.dtype

        def block(channels, features):
            return ResidualBlock(channels, features, dtype=dtype, rngs=rngs)

        def up(channels, features):
            return UpBlock(channels, features, dtype=dtype, rngs=rngs)

        self.swinViT = SwinTransformer(config, rngs=rngs)
        self.encoder1 = block(config.in_channels, f)
        self.encoder2 = block(f, f)
        self.encoder3 = block(2 * f, 2 * f)
        self.encoder4 = block(4 * f, 4 * f)
        self.encoder10 = block(16 * f, 16 * f)
        self.decoder5 = up(16 * f, 8 * f)
        self.decoder4 = up(8 * f, 4 * f)
        self.decoder3 = up(4 * f, 2 * f)
        self.decoder2 = up(2 * f, f)
        self.decoder1 = up(f, f)
        self.out = Conv(
            f, config.out_channels, kernel_size=1, use_bias=True, dtype=dtype, rngs=rngs
        )

    def hidden_states(
        self, x: jax.Array, *, rngs: nnx.Rngs | None = None
    ) -> list[jax.Array]:
        """Return the encoder's five hidden states of [B, D, H, W, C_in]."""
        self._check(x)
        return self.swinViT(x, key=_key(rngs))[0]

    def __call__(
        self,
        x: jax.Array,
        *,
        rngs: nnx.Rngs | None = None,
        return_routing: bool | str = False,
    ) -> jax.Array | tuple[jax.Array, dict[str, Routing]]:
        """Segment a batch of volumes.

        Args:
            x: [B, D, H, W, C_in], every side a multiple of `total_stride`.
            rngs: switches dropout and drop path on; without it the result is
                deterministic.
            return_routing: True also returns the dispatch and combine weights of every
                Soft MoE, under names such as "stage2/block0": N x N matrices, for which
                the routing is dense. "statistics" returns `RoutingStatistics`, for
                which no such matrix is made.

        Returns:
            float32 logits [B, D, H, W, K].

        Raises:
            UserError: for a wrong rank, number of channels or side.
        """
        y, routing = self._features(x, rngs=rngs, return_routing=return_routing)
        with jax.named_scope("head"):
            logits = self.head(y).astype(jnp.float32)
        return (logits, routing) if return_routing else logits

    @property
    def head(self) -> Conv:
        """The last layer, from features to logits."""
        return self.out

    def features(self, x: jax.Array, *, rngs: nnx.Rngs | None = None) -> jax.Array:
        """Return what the head is applied to, [B, D, H, W, feature_size]."""
        return self._features(x, rngs=rngs, return_routing=False)[0]

    def _features(self, x, *, rngs, return_routing):
        self._check(x)
        hidden, routing = self.swinViT(x, key=_key(rngs), return_routing=return_routing)
        run = nnx.remat(_apply) if "encoder" in self.config.remat else _apply
        with jax.named_scope("encoder"):
            skips = [
                run(self.encoder1, x),
                run(self.encoder2, hidden[0]),
                run(self.encoder3, hidden[1]),
                run(self.encoder4, hidden[2]),
                hidden[3],
            ]
            y = run(self.encoder10, hidden[4])
        run = nnx.remat(_apply) if "decoder" in self.config.remat else _apply
        for level in (5, 4, 3, 2, 1):
            with jax.named_scope(f"decoder{level}"):
                y = run(getattr(self, f"decoder{level}"), y, skips[level - 1])
        return y, routing

    def _check(self, x):
        checks.image_batch(
            x.shape, channels=self.config.in_channels, stride=self.total_stride
        )


def _key(rngs):
    return None if rngs is None else rngs.dropout()


def _apply(module, *inputs):
    return module(*inputs)
