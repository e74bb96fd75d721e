"""nnFormer (Zhou et al. 2023): window attention in encoder and decoder.

As published for abdominal CT ("Synapse"), without deep supervision: the skips enter the
decoder as keys and values of an attention, and windows shrink to small grids.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import nnx

from swinsmt_jax import checks
from swinsmt_jax.layers.attention import SkipAttention
from swinsmt_jax.layers.conv import Conv, UpConv
from swinsmt_jax.layers.linear import MLP, LayerNorm, drop_path, fold_in, gelu
from swinsmt_jax.layers.recompute import maybe_remat
from swinsmt_jax.layers.swin import SwinBlock
from swinsmt_jax.models.network import Network, dropout_key
from swinsmt_jax.models.registry import (
    NetworkConfig,
    PerStage,
    broadcast_to_tuple,
    register,
)
from swinsmt_jax.models.torch_names import UP_CONV, NameTable
from swinsmt_jax.ops import windows
from swinsmt_jax.ops.convolution import Sides

MLP_RATIO = 4


@dataclass(frozen=True, kw_only=True)
class NNFormerConfig(NetworkConfig):
    """nnFormer (Zhou et al. 2023), in its published form for abdominal CT.

    Attributes:
        crop_size: the only input shape (D, H, W) that the network takes, or its side;
            multiples of 16, 32 and 32. Where a stage's grid is smaller than its
            window, the window and its table of positions shrink to the grid.
        embedding_dim: channels of the first stage, doubled at each further one.
        depths: transformer blocks per stage; those of the first three are the
            decoder's too.
        num_heads: attention heads per stage.
        patch_size: (2, 4, 4), for which alone the embedding's strides are published.
        window_size: side of the attention window per stage.
        drop_path_rate: stochastic depth, rising linearly from 0 to this rate.
    """

    crop_size: checks.OneOrEach
    embedding_dim: checks.Positive = 192
    depths: PerStage = (2, 2, 2, 2)
    num_heads: PerStage = (6, 12, 24, 48)
    patch_size: checks.Positives = (2, 4, 4)
    window_size: PerStage = (4, 4, 8, 4)
    drop_path_rate: checks.Share = 0.2

    def __post_init__(self):
        super().__post_init__()
        broadcast_to_tuple(self, "crop_size", 3)
        checks.one_of("model.patch_size", self.patch_size, [(2, 4, 4)])
        checks.spatial_shape(
            "model.crop_size", self.crop_size, [8 * p for p in self.patch_size]
        )
        checks.require(
            self.embedding_dim % 2 == 0,
            f"model.embedding_dim is {self.embedding_dim}, but must be even.",
        )
        for stage, heads in enumerate(self.num_heads):
            channels = self.embedding_dim * 2**stage
            checks.require(
                channels % heads == 0,
                f"model.num_heads is {self.num_heads}: stage {stage + 1} has "
                f"{channels} channels, which {heads} heads do not divide.",
            )

    @property
    def total_stride(self) -> int:
        """Divisor that suits all sides of the input; the depth needs less."""
        return 8 * max(self.patch_size)

    @property
    def input_shape(self) -> tuple[int, ...]:
        """The only spatial shape that the network takes."""
        return checks.each(self.crop_size)


class Project(nnx.Module):
    """Two convolutions, the first with strides, each with GELU and layer norm.

    The `last` of the embedding ends with its second convolution.
    """

    def __init__(
        self,
        channels: int,
        features: int,
        *,
        strides: Sides,
        last: bool,
        dtype: str,
        rngs: nnx.Rngs,
    ):
        common: dict = {
            "kernel_size": 3,
            "use_bias": True,
            "dtype": dtype,
            "rngs": rngs,
        }
        self.conv1 = Conv(channels, features, strides=strides, **common)
        self.conv2 = Conv(features, features, **common)
        self.norm1 = LayerNorm(features, dtype=dtype)
        self.norm2 = None if last else LayerNorm(features, dtype=dtype)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Map [B, D, H, W, C] to [B, D/s, H/s, W/s, O]."""
        x = self.conv2(self.norm1(gelu(self.conv1(x))))
        return x if self.norm2 is None else self.norm2(gelu(x))


class ConvEmbed(nnx.Module):
    """Convolutions that turn patches of 2 x 4 x 4 voxels into tokens."""

    def __init__(self, config: NNFormerConfig, *, rngs: nnx.Rngs):
        size = config.embedding_dim
        common: dict = {"dtype": config.dtype, "rngs": rngs}
        channels, half = config.in_channels, size // 2
        self.proj1 = Project(channels, half, strides=(2, 2, 2), last=False, **common)
        self.proj2 = Project(half, size, strides=(1, 2, 2), last=True, **common)
        self.norm = LayerNorm(size, dtype=config.dtype)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Map [B, D, H, W, C_in] to tokens [B, D/2, H/4, W/4, C]."""
        return self.norm(self.proj2(self.proj1(x)))


class Downsample(nnx.Module):
    """GELU, layer norm and a convolution that halves the grid."""

    def __init__(self, channels: int, *, dtype: str, rngs: nnx.Rngs):
        common: dict = {
            "kernel_size": 3,
            "use_bias": True,
            "dtype": dtype,
            "rngs": rngs,
        }
        self.norm = LayerNorm(channels, dtype=dtype)
        self.reduction = Conv(channels, 2 * channels, strides=2, **common)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Map [B, D, H, W, C] to [B, D/2, H/2, W/2, 2C]."""
        return self.reduction(self.norm(gelu(x)))


class Upsample(nnx.Module):
    """Layer norm and a transposed convolution that doubles the grid."""

    def __init__(self, channels: int, *, dtype: str, rngs: nnx.Rngs):
        self.norm = LayerNorm(channels, dtype=dtype)
        self.up = UpConv(channels, channels // 2, use_bias=True, dtype=dtype, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Map [B, D, H, W, C] to [B, 2D, 2H, 2W, C/2]."""
        return self.up(self.norm(x))


class SkipBlock(nnx.Module):
    """A block whose attention takes keys and values from the skip."""

    def __init__(
        self,
        channels: int,
        *,
        num_heads: int,
        window: windows.Triple,
        rate: float,
        dtype: str,
        rngs: nnx.Rngs,
    ):
        self.window = window
        self.drop_path_rate = rate
        self.norm1 = LayerNorm(channels, dtype=dtype)
        self.attn = SkipAttention(
            channels,
            num_heads=num_heads,
            window_size=window,
            position_index=windows.nnformer_position_index,
            dtype=dtype,
            rngs=rngs,
        )
        self.norm2 = LayerNorm(channels, dtype=dtype)
        self.mlp = MLP(channels, hidden=MLP_RATIO * channels, dtype=dtype, rngs=rngs)

    def __call__(
        self, x: jax.Array, skip: jax.Array, key: jax.Array | None
    ) -> jax.Array:
        """Map [B, D, H, W, C] and a skip of the same shape to that shape."""
        d, h, w = x.shape[1:4]
        query, source = (
            windows.partition(windows.pad(self.norm1(part), self.window), self.window)
            for part in (x, skip)
        )
        padded = [n + -n % side for n, side in zip((d, h, w), self.window, strict=True)]
        y = windows.merge(self.attn(query, source), self.window, tuple(padded))
        rate = self.drop_path_rate
        x = x + skip + drop_path(y[:, :d, :h, :w], rate=rate, key=fold_in(key, 0))
        y = self.mlp(self.norm2(x))
        return x + drop_path(y, rate=rate, key=fold_in(key, 1))


class EncoderStage(nnx.Module):
    """Blocks without and with shift in turn; then all but the last halve the grid.

    `stage` is the 0-based index, `rates` are those of drop path, one a block.
    """

    def __init__(
        self,
        config: NNFormerConfig,
        *,
        stage: int,
        rates: Sequence[float],
        rngs: nnx.Rngs,
    ):
        channels, dtype = config.embedding_dim * 2**stage, config.dtype
        self.blocks = nnx.List(
            _block(config, stage=stage, shifted=i % 2 == 1, rate=rate, rngs=rngs)
            for i, rate in enumerate(rates)
        )
        last = stage == len(config.depths) - 1
        self.downsample = None if last else Downsample(channels, dtype=dtype, rngs=rngs)

    def __call__(
        self, x: jax.Array, key: jax.Array | None
    ) -> tuple[jax.Array, jax.Array]:
        """Return the tokens before and after halving the grid."""
        for i, block in enumerate(self.blocks):
            x, _ = block(x, key=fold_in(key, i))
        return x, x if self.downsample is None else self.downsample(x)


class DecoderStage(nnx.Module):
    """Double the grid, attend to the skip, then blocks with shift."""

    def __init__(
        self,
        config: NNFormerConfig,
        *,
        stage: int,
        rates: Sequence[float],
        rngs: nnx.Rngs,
    ):
        channels, dtype = config.embedding_dim * 2**stage, config.dtype
        first = SkipBlock(
            channels,
            num_heads=config.num_heads[stage],
            window=_window(config, stage)[0],
            rate=rates[0],
            dtype=dtype,
            rngs=rngs,
        )
        rest = (
            _block(config, stage=stage, shifted=True, rate=rate, rngs=rngs)
            for rate in rates[1:]
        )
        self.blocks = nnx.List([first, *rest])
        self.upsample = Upsample(2 * channels, dtype=dtype, rngs=rngs)

    def __call__(
        self, x: jax.Array, skip: jax.Array, key: jax.Array | None
    ) -> jax.Array:
        """Map [B, D, H, W, 2C] and a skip [B, 2D, 2H, 2W, C] to the skip's shape."""
        first, *rest = self.blocks
        x = first(self.upsample(x), skip, fold_in(key, 0))
        for i, block in enumerate(rest):
            x, _ = block(x, key=fold_in(key, i + 1))
        return x


class Encoder(nnx.Module):
    """Embedding and four stages."""

    def __init__(self, config: NNFormerConfig, *, rngs: nnx.Rngs):
        self.recompute = "encoder" in config.remat
        self.patch_embed = ConvEmbed(config, rngs=rngs)
        rates = _rates(config.depths, config.drop_path_rate)
        self.layers = nnx.List(
            EncoderStage(config, stage=i, rates=rates[i], rngs=rngs)
            for i in range(len(config.depths))
        )
        for i in range(len(config.depths)):
            norm = LayerNorm(config.embedding_dim * 2**i, dtype=config.dtype)
            setattr(self, f"norm{i}", norm)

    def __call__(self, x: jax.Array, *, key: jax.Array | None) -> list[jax.Array]:
        """Return the normed tokens of every stage, the finest first."""
        run = maybe_remat(self.recompute)
        x, results = run(self.patch_embed, x), []
        for i, layer in enumerate(self.layers):
            with jax.named_scope(f"encoder{i}"):
                skip, x = run(layer, x, fold_in(key, i))
                results.append(getattr(self, f"norm{i}")(skip))
        return results


class Decoder(nnx.Module):
    """Three stages; the first one is the finest and runs last."""

    def __init__(self, config: NNFormerConfig, *, rngs: nnx.Rngs):
        self.recompute = "decoder" in config.remat
        rates = _rates(config.depths[-2::-1], config.drop_path_rate)[::-1]
        self.layers = nnx.List(
            DecoderStage(config, stage=i, rates=rates[i], rngs=rngs)
            for i in range(len(rates))
        )

    def __call__(self, skips: list[jax.Array], *, key: jax.Array | None) -> jax.Array:
        """Return the tokens of the finest stage."""
        run, x = maybe_remat(self.recompute), skips[-1]
        for i in range(len(self.layers))[::-1]:
            with jax.named_scope(f"decoder{i}"):
                x = run(self.layers[i], x, skips[i], fold_in(key, i))
        return x


class NNFormer(Network):
    """nnFormer. Its last layer is a transposed convolution, so it has no `head`."""

    def __init__(self, config: NNFormerConfig, *, rngs: nnx.Rngs):
        super().__init__(config)
        self.model_down = Encoder(config, rngs=rngs)
        self.decoder = Decoder(config, rngs=rngs)
        up = UpConv(
            config.embedding_dim,
            config.out_channels,
            strides=config.patch_size,
            use_bias=True,
            dtype=config.dtype,
            rngs=rngs,
        )
        self.final = nnx.Dict(up=up)

    def __call__(self, x: jax.Array, *, rngs: nnx.Rngs | None = None) -> jax.Array:
        """Segment a batch of volumes; see `Network`."""
        self.check_input(x)
        key = dropout_key(rngs)
        skips = self.model_down(x, key=fold_in(key, 0))
        x = self.decoder(skips, key=fold_in(key, 1))
        with jax.named_scope("head"):
            return self.final.up(x).astype(jnp.float32)


def _rates(depths, highest):
    """Drop-path rates of each block of each stage, rising linearly from 0."""
    step = highest / max(1, sum(depths) - 1)
    return [
        [step * (sum(depths[:i]) + j) for j in range(depth)]
        for i, depth in enumerate(depths)
    ]


def _window(config, stage):
    """Cubic window and shift of a stage.

    A window that is not smaller than every side of the grid shrinks to the smallest
    side, and is not shifted.
    """
    sides = zip(config.crop_size, config.patch_size, strict=True)
    smallest = min(side // patch // 2**stage for side, patch in sides)
    window = config.window_size[stage]
    if smallest <= window:
        return (smallest,) * 3, (0, 0, 0)
    return (window,) * 3, (window // 2,) * 3


def _block(config, *, stage, shifted, rate, rngs):
    channels = config.embedding_dim * 2**stage
    window, shift = _window(config, stage)
    return SwinBlock(
        channels,
        num_heads=config.num_heads[stage],
        window_size=window,
        shift=shift if shifted else (0, 0, 0),
        mlp=MLP(channels, hidden=MLP_RATIO * channels, dtype=config.dtype, rngs=rngs),
        drop_path_rate=rate,
        position_index=windows.nnformer_position_index,
        dtype=config.dtype,
        rngs=rngs,
    )


TORCH_NAMES = NameTable(
    renames=(
        (r"\.mlp\.linear(\d)\.", r".mlp.fc\1."),
        (r"\.upsample\.", r".Upsample."),
        (r"^final\.up\.", r"final.0.up."),
    ),
    layouts=((r"/up/kernel", UP_CONV),),
    unneeded=r".*\.relative_position_index",
)
register(
    "nnformer",
    NNFormerConfig,
    NNFormer,
    torch_names=TORCH_NAMES,
    tiny={
        "crop_size": (32, 64, 64),
        "embedding_dim": 8,  # of 2 the embedding norms a single channel
        "depths": (2, 1, 1, 1),
        "num_heads": (1, 1, 1, 1),
    },
)
