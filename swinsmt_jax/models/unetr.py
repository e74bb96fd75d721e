"""UNETR (Hatamizadeh et al. 2022): a vision transformer with a convolutional decoder.

As in MONAI, with its convolutional patch embedding and learnt positions. These fix the
shape of the input.
"""

from dataclasses import dataclass
from typing import ClassVar

import jax
from flax import nnx

from swinsmt_jax import checks
from swinsmt_jax.layers import initializers
from swinsmt_jax.layers.attention import SelfAttention
from swinsmt_jax.layers.conv import Conv, PatchConv, ResidualBlock, UpBlock, UpConv
from swinsmt_jax.layers.linear import MLP, LayerNorm, dropout, fold_in
from swinsmt_jax.layers.recompute import maybe_remat
from swinsmt_jax.models.network import Network, dropout_key
from swinsmt_jax.models.registry import NetworkConfig, broadcast_to_tuple, register
from swinsmt_jax.models.torch_names import (
    MONAI_LAYOUTS,
    MONAI_RENAMES,
    UP_CONV,
    NameTable,
)

NUM_LAYERS = 12
SKIPS = (3, 6, 9)  # 0-based layers whose results the decoder gets


@dataclass(frozen=True, kw_only=True)
class UNETRConfig(NetworkConfig):
    """UNETR (Hatamizadeh et al. 2022): a vision transformer of 12 layers as encoder.

    Attributes:
        img_size: the only input shape (D, H, W) that the network takes, or its side;
            multiples of 16. Every patch has a learnt position embedding.
        feature_size: channels of the finest decoder stage.
        hidden_size: channels of the transformer, a multiple of `num_heads`.
        mlp_dim: hidden channels of its MLPs.
        num_heads: attention heads.
        qkv_bias: whether queries, keys and values have a bias.
        dropout_rate: after embedding, projections, MLPs and on attention weights.
    """

    img_size: checks.OneOrEach
    feature_size: checks.Positive = 16
    hidden_size: checks.Positive = 768
    mlp_dim: checks.Positive = 3072
    num_heads: checks.Positive = 12
    qkv_bias: bool = False
    dropout_rate: checks.Share = 0.0

    total_stride: ClassVar = 16  # the patch

    def __post_init__(self):
        super().__post_init__()
        broadcast_to_tuple(self, "img_size", 3)
        checks.spatial_shape("model.img_size", self.img_size, self.total_stride)
        checks.require(
            self.hidden_size % self.num_heads == 0,
            f"model.hidden_size is {self.hidden_size}, but must be a multiple of "
            f"model.num_heads, {self.num_heads}.",
        )

    @property
    def input_shape(self) -> tuple[int, ...]:
        """The only spatial shape that the network takes."""
        return checks.each(self.img_size)


class PatchEmbedding(nnx.Module):
    """Patches of 16 x 16 x 16 voxels as tokens, plus their learnt positions."""

    def __init__(self, config: UNETRConfig, *, rngs: nnx.Rngs):
        self.dropout_rate = config.dropout_rate
        stride = config.total_stride
        channels = config.in_channels
        common: dict = {"dtype": config.dtype, "rngs": rngs}
        self.patch_embeddings = PatchConv(
            channels, config.hidden_size, patch_size=stride, **common
        )
        d, h, w = (side // stride for side in config.input_shape)
        self.position_embeddings = initializers.truncated_normal(
            rngs, (1, d * h * w, config.hidden_size), stddev=0.02
        )

    def __call__(self, x: jax.Array, *, key: jax.Array | None = None) -> jax.Array:
        """Map [B, D, H, W, C_in] to tokens [B, N, C]."""
        x = self.patch_embeddings(x)
        x = x.reshape(x.shape[0], -1, x.shape[-1])
        x = x + self.position_embeddings[...].astype(x.dtype)
        return dropout(x, rate=self.dropout_rate, key=key)


class TransformerBlock(nnx.Module):
    """Self-attention and an MLP, each normed before and added."""

    def __init__(self, config: UNETRConfig, *, rngs: nnx.Rngs):
        size, dtype = config.hidden_size, config.dtype
        common: dict = {
            "dropout_rate": config.dropout_rate,
            "dtype": dtype,
            "rngs": rngs,
        }
        self.mlp = MLP(size, hidden=config.mlp_dim, **common)
        self.norm1 = LayerNorm(size, dtype=dtype)
        self.attn = SelfAttention(
            size, num_heads=config.num_heads, qkv_bias=config.qkv_bias, **common
        )
        self.norm2 = LayerNorm(size, dtype=dtype)
        # MONAI makes it for cross-attention, which UNETR has none of.
        self.norm_cross_attn = LayerNorm(size, dtype=dtype)

    def __call__(self, x: jax.Array, key: jax.Array | None) -> jax.Array:
        """Map tokens [B, N, C] to [B, N, C]."""
        x = x + self.attn(self.norm1(x), key=fold_in(key, 0))
        return x + self.mlp(self.norm2(x), key=fold_in(key, 1))


class VisionTransformer(nnx.Module):
    """Patch embedding and twelve transformer blocks (Dosovitskiy et al. 2021)."""

    def __init__(self, config: UNETRConfig, *, rngs: nnx.Rngs):
        self.recompute = "encoder" in config.remat
        self.patch_embedding = PatchEmbedding(config, rngs=rngs)
        self.blocks = nnx.List(
            TransformerBlock(config, rngs=rngs) for _ in range(NUM_LAYERS)
        )
        self.norm = LayerNorm(config.hidden_size, dtype=config.dtype)

    def __call__(
        self, x: jax.Array, *, key: jax.Array | None = None
    ) -> list[jax.Array]:
        """Return the tokens [B, N, C] of the layers `SKIPS` and the normed result."""
        run = maybe_remat(self.recompute)
        x, results = self.patch_embedding(x, key=fold_in(key, NUM_LAYERS)), []
        for i, block in enumerate(self.blocks):
            with jax.named_scope(f"block{i}"):
                x = run(block, x, fold_in(key, i))
            if i in SKIPS:
                results.append(x)
        return [*results, self.norm(x)]


class ProjectedUp(nnx.Module):
    """Bring a coarse skip to its stage: each step doubles the grid."""

    def __init__(
        self, channels: int, features: int, *, count: int, dtype: str, rngs: nnx.Rngs
    ):
        common: dict = {"dtype": dtype, "rngs": rngs}
        self.transp_conv_init = UpConv(channels, features, **common)
        self.blocks = nnx.List(
            nnx.List(
                layer(features, features, **common) for layer in (UpConv, ResidualBlock)
            )
            for _ in range(count)
        )

    def __call__(self, x: jax.Array) -> jax.Array:
        """Map [B, D, H, W, C] to sides 2^(count + 1) times as long, with O channels."""
        x = self.transp_conv_init(x)
        for up, block in self.blocks:
            x = block(up(x))
        return x


class UNETR(Network):
    """UNETR."""

    def __init__(self, config: UNETRConfig, *, rngs: nnx.Rngs):
        super().__init__(config)
        f, hidden = config.feature_size, config.hidden_size
        common: dict = {"dtype": config.dtype, "rngs": rngs}
        self.vit = VisionTransformer(config, rngs=rngs)
        self.encoder1 = ResidualBlock(config.in_channels, f, **common)
        self.encoder2 = ProjectedUp(hidden, 2 * f, count=2, **common)
        self.encoder3 = ProjectedUp(hidden, 4 * f, count=1, **common)
        self.encoder4 = ProjectedUp(hidden, 8 * f, count=0, **common)
        self.decoder5 = UpBlock(hidden, 8 * f, **common)
        self.decoder4 = UpBlock(8 * f, 4 * f, **common)
        self.decoder3 = UpBlock(4 * f, 2 * f, **common)
        self.decoder2 = UpBlock(2 * f, f, **common)
        self.out = Conv(f, config.out_channels, kernel_size=1, use_bias=True, **common)

    def features(self, x: jax.Array, *, rngs: nnx.Rngs | None = None) -> jax.Array:
        """Return what the head is applied to, [B, D, H, W, F]."""
        self.check_input(x)
        grid = [side // UNETRConfig.total_stride for side in x.shape[1:4]]
        with jax.named_scope("transformer"):
            tokens = self.vit(x, key=dropout_key(rngs))
        coarse = [t.reshape(t.shape[0], *grid, t.shape[-1]) for t in tokens]
        run = maybe_remat("encoder" in self.config.remat)
        with jax.named_scope("encoder"):
            skips = [
                run(self.encoder1, x),
                run(self.encoder2, coarse[0]),
                run(self.encoder3, coarse[1]),
                run(self.encoder4, coarse[2]),
            ]
        y, run = coarse[3], maybe_remat("decoder" in self.config.remat)
        for level in (5, 4, 3, 2):
            with jax.named_scope(f"decoder{level}"):
                y = run(getattr(self, f"decoder{level}"), y, skips[level - 2])
        return y


TORCH_NAMES = NameTable(
    renames=(
        (r"^(encoder\d\.transp_conv_init)\.", r"\1.conv."),
        (r"^(encoder\d\.blocks\.\d\.(0|1\.conv\d))\.", r"\1.conv."),
        *MONAI_RENAMES,
    ),
    layouts=(
        (r"encoder\d/(transp_conv_init|blocks/\d/0)/kernel", UP_CONV),
        *MONAI_LAYOUTS,
    ),
)
register(
    "unetr",
    UNETRConfig,
    UNETR,
    torch_names=TORCH_NAMES,
    tiny={
        "img_size": (16, 16, 32),
        "feature_size": 2,
        "hidden_size": 4,
        "mlp_dim": 3,
        "num_heads": 2,
    },
)
