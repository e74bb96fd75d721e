"""UNesT (Yu et al. 2023): a nested transformer of three levels as encoder.

Tokens attend to those of their block; between the levels, convolutions and pooling
over the whole grid join eight blocks to one. Positions are learnt, so the shape of the
input is fixed.
"""

from dataclasses import dataclass
from typing import Annotated, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx

from swinsmt_jax import checks
from swinsmt_jax.layers import initializers
from swinsmt_jax.layers.conv import (
    Conv,
    PatchConv,
    ResidualBlock,
    UpBlock,
    UpConv,
    instance_norm,
)
from swinsmt_jax.layers.linear import MLP, LayerNorm, drop_path, fold_in, linear
from swinsmt_jax.layers.recompute import maybe_remat
from swinsmt_jax.models.network import Network, dropout_key
from swinsmt_jax.models.registry import NetworkConfig, broadcast_to_tuple, register
from swinsmt_jax.models.torch_names import (
    MONAI_LAYOUTS,
    MONAI_RENAMES,
    UP_CONV,
    NameTable,
)
from swinsmt_jax.ops import by_platform, windows

PATCH = 4
BLOCKS = (4, 2, 1)  # blocks a side of each level
MLP_RATIO = 4
EPSILON = 1e-6  # of the encoder's layer norms
STDDEV = 0.02  # of the initial weights of linear layers and of positions

PerLevel = Annotated[checks.Positives, checks.entries(len(BLOCKS))]


@dataclass(frozen=True, kw_only=True)
class UNesTConfig(NetworkConfig):
    """UNesT (Yu et al. 2023): a nested hierarchical transformer; "base" by default.

    Attributes:
        img_size: side of the cube that the network takes, or all three, which are
            equal: a multiple of 32, and at least 64. Every token has a learnt position.
        feature_size: f; the decoder has 2 f channels at full resolution.
        embed_dim: channels of each level, multiples of its heads; the last one is 32 f.
        depths: transformer layers of each level.
        num_heads: attention heads of each level.
        drop_path_rate: stochastic depth, rising linearly from 0 to this rate.
    """

    img_size: checks.OneOrEach
    feature_size: checks.Positive = 16
    embed_dim: PerLevel = (128, 256, 512)
    depths: PerLevel = (2, 2, 8)
    num_heads: PerLevel = (4, 8, 16)
    drop_path_rate: checks.Share = 0.5

    total_stride: ClassVar = 32

    def __post_init__(self):
        super().__post_init__()
        broadcast_to_tuple(self, "img_size", 3)
        checks.spatial_shape("model.img_size", self.img_size, self.total_stride)
        checks.require(
            len(set(self.img_size)) == 1 and self.img_size[0] > self.total_stride,
            f"model.img_size is {self.img_size}, but must be a cube of at least 64 "
            "voxels a side: one of 32 is a single voxel at the bottom, which an "
            "instance norm makes 0.",
        )
        wanted = 32 * self.feature_size
        checks.require(
            self.embed_dim[-1] == wanted,
            f"model.embed_dim is {self.embed_dim}, but its last entry must be 32 times "
            f"model.feature_size = {self.feature_size}: {wanted}.",
        )
        for channels, heads in zip(self.embed_dim, self.num_heads, strict=True):
            checks.require(
                channels % heads == 0,
                f"model.num_heads is {self.num_heads}, but {heads} heads do not divide "
                f"the {channels} channels of their level.",
            )

    @property
    def input_shape(self) -> tuple[int, ...]:
        """The only spatial shape that the network takes."""
        return checks.each(self.img_size)


class BlockAttention(nnx.Module):
    """Self-attention of the tokens of each block."""

    def __init__(self, channels: int, *, num_heads: int, dtype: str, rngs: nnx.Rngs):
        self.num_heads = num_heads
        common: dict = {"stddev": STDDEV, "dtype": dtype, "rngs": rngs}
        self.qkv = linear(channels, 3 * channels, **common)
        self.proj = linear(channels, channels, **common)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Map blocks of tokens [B, W, n, C] to [B, W, n, C]."""
        b, w, n, c = x.shape
        qkv = self.qkv(x).reshape(b, w, n, 3, self.num_heads, c // self.num_heads)
        q, k, v = (qkv[..., i, :, :] for i in range(3))
        y = by_platform.attend_within_windows(q, k, v)
        # Heads are the fastest index here, unlike in q, k and v: so it was published.
        return self.proj(y.swapaxes(-1, -2).reshape(b, w, n, c))


class TransformerLayer(nnx.Module):
    """Attention within blocks and an MLP, each normed before and added."""

    def __init__(
        self,
        channels: int,
        *,
        num_heads: int,
        drop_path_rate: float,
        dtype: str,
        rngs: nnx.Rngs,
    ):
        self.drop_path_rate = drop_path_rate
        common: dict = {"dtype": dtype, "rngs": rngs}
        self.norm1 = LayerNorm(channels, epsilon=EPSILON, dtype=dtype)
        self.attn = BlockAttention(channels, num_heads=num_heads, **common)
        self.norm2 = LayerNorm(channels, epsilon=EPSILON, dtype=dtype)
        hidden = MLP_RATIO * channels
        self.mlp = MLP(channels, hidden=hidden, stddev=STDDEV, **common)

    def __call__(self, x: jax.Array, key: jax.Array | None) -> jax.Array:
        """Map [B, W, n, C] to the same shape."""

        def drop(branch, number):
            key_of = fold_in(key, number)
            return drop_path(branch, rate=self.drop_path_rate, key=key_of)

        x = x + drop(self.attn(self.norm1(x)), 0)
        return x + drop(self.mlp(self.norm2(x)), 1)


def max_pool(x: jax.Array) -> jax.Array:
    """Largest of 3 x 3 x 3 at every second voxel: [B, D, ..., C] -> [B, D/2, ..., C].

    Even sides. It is made of one axis after the other, so that its gradient is no
    scatter, which is slow and on a GPU not the same in each run.
    """
    for axis in (1, 2, 3):
        last = x.shape[axis]
        at = jax.lax.slice_in_dim(x, 0, last, 2, axis)
        after = jax.lax.slice_in_dim(x, 1, last, 2, axis)
        widths = [(1, 0) if i == axis else (0, 0) for i in range(x.ndim)]
        before = jnp.pad(after, widths, constant_values=-jnp.inf)
        before = jax.lax.slice_in_dim(before, 0, last // 2, 1, axis)
        x = jnp.maximum(at, jnp.maximum(before, after))
    return x


class Pool(nnx.Module):
    """Convolution, layer norm and max pooling across the borders of blocks."""

    def __init__(self, channels: int, features: int, *, dtype: str, rngs: nnx.Rngs):
        common: dict = {"dtype": dtype, "rngs": rngs}
        self.conv = Conv(channels, features, kernel_size=3, use_bias=True, **common)
        self.norm = LayerNorm(features, epsilon=EPSILON, dtype=dtype)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Map [B, D, H, W, C] to [B, D/2, H/2, W/2, O]."""
        return max_pool(self.norm(self.conv(x)))


class Level(nnx.Module):
    """Transformer layers within the blocks of a grid; all but level 0 pool before."""

    def __init__(
        self, config: UNesTConfig, level: int, *, rates: list[float], rngs: nnx.Rngs
    ):
        self.recompute = "encoder" in config.remat
        channels, before = config.embed_dim[level], config.embed_dim[level - 1]
        common: dict = {"dtype": config.dtype, "rngs": rngs}
        self.pool = Pool(before, channels, **common) if level else None
        side = config.input_shape[0] // (PATCH * BLOCKS[0])
        self.window = (side,) * 3
        table = (1, BLOCKS[level] ** 3, side**3, channels)
        self.pos_embed = initializers.normal(rngs, table, stddev=STDDEV)
        heads = config.num_heads[level]
        self.transformer_encoder = nnx.List(
            TransformerLayer(channels, num_heads=heads, drop_path_rate=rate, **common)
            for rate in rates
        )

    def __call__(self, x: jax.Array, *, key: jax.Array | None = None) -> jax.Array:
        """Map a grid [B, D, H, W, C] to the level's, [B, D/2, H/2, W/2, O]."""
        run = maybe_remat(self.recompute)
        x = x if self.pool is None else run(self.pool, x)
        grid = x.shape[1:4]
        x = windows.partition(x, self.window)
        x = x + self.pos_embed[...].astype(x.dtype)
        for i, layer in enumerate(self.transformer_encoder):
            x = run(layer, x, fold_in(key, i))
        return windows.merge(x, self.window, grid)


class PatchEmbed(nnx.Module):
    """Patches of 4 x 4 x 4 voxels as tokens."""

    def __init__(self, config: UNesTConfig, *, rngs: nnx.Rngs):
        self.proj = PatchConv(
            config.in_channels,
            config.embed_dim[0],
            patch_size=PATCH,
            dtype=config.dtype,
            rngs=rngs,
        )

    def __call__(self, x: jax.Array) -> jax.Array:
        """Map [B, D, H, W, C_in] to [B, D/4, H/4, W/4, C]."""
        return self.proj(x)


class NestedTransformer(nnx.Module):
    """Patch embedding and three levels (Zhang et al. 2022)."""

    def __init__(self, config: UNesTConfig, *, rngs: nnx.Rngs):
        self.patch_embed = PatchEmbed(config, rngs=rngs)
        step = config.drop_path_rate / max(1, sum(config.depths) - 1)
        rates = iter(step * i for i in range(sum(config.depths)))
        self.levels = nnx.List(
            Level(config, i, rates=[next(rates) for _ in range(depth)], rngs=rngs)
            for i, depth in enumerate(config.depths)
        )
        self.norm = LayerNorm(config.embed_dim[-1], epsilon=EPSILON, dtype=config.dtype)

    def __call__(
        self, x: jax.Array, *, key: jax.Array | None = None
    ) -> list[jax.Array]:
        """Return embedding and levels, and the last normed: at 1/4, 1/4, 1/8, 1/16."""
        results = [self.patch_embed(x)]
        for i, level in enumerate(self.levels):
            with jax.named_scope(f"level{i}"):
                results.append(level(results[-1], key=fold_in(key, i)))
        return [*results, self.norm(results[-1])]


class ProjectedUp(nnx.Module):
    """Two transposed convolutions; only the first one doubles the grid."""

    def __init__(self, channels: int, features: int, *, dtype: str, rngs: nnx.Rngs):
        common: dict = {"dtype": dtype, "rngs": rngs}
        self.transp_conv_init = UpConv(channels, features, **common)
        self.blocks = nnx.List([UpConv(features, features, strides=1, **common)])

    def __call__(self, x: jax.Array) -> jax.Array:
        """Map [B, D, H, W, C] to [B, 2D, 2H, 2W, O]."""
        x = self.transp_conv_init(x)
        for block in self.blocks:
            x = block(x)
        return x


class Bottom(nnx.Module):
    """A strided convolution, PReLU of one slope, and then an instance norm."""

    def __init__(self, channels: int, features: int, *, dtype: str, rngs: nnx.Rngs):
        self.conv = Conv(
            channels,
            features,
            kernel_size=3,
            strides=2,
            use_bias=True,
            dtype=dtype,
            rngs=rngs,
        )
        self.slope = initializers.constant(0.25, (1,))

    def __call__(self, x: jax.Array) -> jax.Array:
        """Map [B, D, H, W, C] to [B, D/2, H/2, W/2, O]."""
        x = self.conv(x)
        x = jnp.where(x >= 0, x, self.slope[...].astype(x.dtype) * x)
        return instance_norm(x)


class UNesT(Network):
    """UNesT."""

    def __init__(self, config: UNesTConfig, *, rngs: nnx.Rngs):
        super().__init__(config)
        f = config.feature_size
        common: dict = {"dtype": config.dtype, "rngs": rngs}
        first, second, last = config.embed_dim
        self.nestViT = NestedTransformer(config, rngs=rngs)
        self.encoder1 = ResidualBlock(config.in_channels, 2 * f, **common)
        self.encoder2 = ProjectedUp(first, 4 * f, **common)
        self.encoder3 = ResidualBlock(first, 8 * f, **common)
        self.encoder4 = ResidualBlock(second, 16 * f, **common)
        self.encoder10 = Bottom(last, 64 * f, **common)
        for level in (5, 4, 3, 2, 1):
            up = UpBlock(2 ** (level + 1) * f, 2**level * f, **common)
            setattr(self, f"decoder{level}", up)
        self.out = Conv(
            2 * f, config.out_channels, kernel_size=1, use_bias=True, **common
        )

    def features(self, x: jax.Array, *, rngs: nnx.Rngs | None = None) -> jax.Array:
        """Return what the head is applied to, [B, D, H, W, F]."""
        self.check_input(x)
        with jax.named_scope("transformer"):
            *fine, coarse, normed = self.nestViT(x, key=dropout_key(rngs))
        run = maybe_remat("encoder" in self.config.remat)
        with jax.named_scope("encoder"):
            skips = [
                run(getattr(self, f"encoder{i}"), grid)
                for i, grid in enumerate((x, *fine), start=1)
            ]
            y = run(self.encoder10, normed)
        run = maybe_remat("decoder" in self.config.remat)
        for level, skip in zip((5, 4, 3, 2, 1), (coarse, *skips[::-1]), strict=True):
            with jax.named_scope(f"decoder{level}"):
                y = run(getattr(self, f"decoder{level}"), y, skip)
        return y


TORCH_NAMES = NameTable(
    renames=(
        (r"\.mlp\.linear(\d)\.", r".mlp.fc\1."),
        (r"^(encoder2\.(transp_conv_init|blocks\.\d))\.", r"\1.conv."),
        (r"^encoder10\.slope$", "encoder10.adn.A.weight"),
        *MONAI_RENAMES,
    ),
    layouts=(
        (r"^encoder2/(transp_conv_init|blocks/\d)/kernel", UP_CONV),
        *MONAI_LAYOUTS,
    ),
    # MONAI before 0.9 has the shortcut's convolution where none is applied.
    unneeded=r"encoder[34]\.layer\.conv3\.conv\.weight",
)
register(
    "unest",
    UNesTConfig,
    UNesT,
    torch_names=TORCH_NAMES,
    tiny={
        "img_size": 64,
        "feature_size": 1,
        "embed_dim": (4, 16, 32),
        "depths": (1, 1, 1),
        "num_heads": (1, 2, 2),
    },
)
