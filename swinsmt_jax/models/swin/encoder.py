"""The Swin transformer encoder, with MLPs or Soft Mixtures-of-Experts."""

import jax
from flax import nnx

from swinsmt_jax import checks
from swinsmt_jax.layers.conv import ResidualBlock
from swinsmt_jax.layers.linear import MLP, dropout, fold_in
from swinsmt_jax.layers.patch import PatchEmbed, PatchMerging
from swinsmt_jax.layers.soft_moe import Routing, SoftMoE
from swinsmt_jax.layers.swin import SwinBlock
from swinsmt_jax.models.swin.config import STAGES, SwinUNETRConfig
from swinsmt_jax.ops.normalization import standardize


class SwinStage(nnx.Module):
    """Blocks without and with shift in turn, then patch merging.

    Args:
        config: the network's.
        stage: 0-based index of the stage.
        rngs: initialises the parameters.
    """

    def __init__(self, config: SwinUNETRConfig, *, stage: int, rngs: nnx.Rngs):
        channels = config.feature_size * 2**stage
        depth, before = config.depths[stage], sum(config.depths[:stage])
        step = config.drop_path / max(1, sum(config.depths) - 1)
        window = checks.each(config.window_size)
        shift = tuple(w // 2 for w in window)
        self.blocks = nnx.List(
            SwinBlock(
                channels,
                num_heads=config.num_heads[stage],
                window_size=window,
                shift=shift if i % 2 else (0, 0, 0),
                mlp=_mlp(config, stage=stage, channels=channels, rngs=rngs),
                qkv_bias=config.qkv_bias,
                dropout_rate=config.dropout,
                attention_dropout=config.attention_dropout,
                drop_path_rate=step * (before + i),
                dtype=config.dtype,
                rngs=rngs,
            )
            for i in range(depth)
        )
        self.downsample = PatchMerging(
            channels, mode=config.patch_merging, dtype=config.dtype, rngs=rngs
        )

    def __call__(
        self,
        x: jax.Array,
        *,
        key: jax.Array | None = None,
        return_routing: bool | str = False,
    ) -> tuple[jax.Array, list[Routing | None]]:
        """Map [B, D, H, W, C] to [B, D/2, H/2, W/2, 2C], with one routing per block."""
        routings = []
        for i, block in enumerate(self.blocks):
            with jax.named_scope(f"block{i}"):
                x, routing = block(
                    x, key=fold_in(key, i), return_routing=return_routing
                )
            routings.append(routing)
        with jax.named_scope("merge"):
            return self.downsample(x), routings


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
    ) -> tuple[list[jax.Array], dict[str, Routing]]:
        """Return five hidden states of [B, D, H, W, C_in], and the routing weights.

        Hidden state i has feature_size * 2^i channels on the grid D / 2^(i+1).
        """
        with jax.named_scope("patch_embed"):
            x = self.patch_embed(x)
            x = dropout(x, rate=self.config.dropout, key=fold_in(key, 0))
        hidden = [self._normalized(x)]
        routing: dict[str, Routing] = {}
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


def _mlp(config, *, stage, channels, rngs):
    hidden = int(channels * config.mlp_ratio)
    shared = dict(
        hidden=hidden, dropout_rate=config.dropout, dtype=config.dtype, rngs=rngs
    )
    if f"{STAGES[stage]}/block0" not in config.moe_strides:
        return MLP(channels, **shared)
    return SoftMoE(channels, config, **shared)
