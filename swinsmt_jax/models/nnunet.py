"""nnU-Net: the plain U-Net and the one with a residual encoder (Isensee et al.).

Both as in the package dynamic-network-architectures, without deep supervision: the
heads of the lower decoder stages are there, as they are in trained weights, but only
the last one is used.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from swinsmt_jax import checks
from swinsmt_jax.layers import initializers
from swinsmt_jax.layers.conv import Conv, InstanceNorm, UpConv, leaky_relu
from swinsmt_jax.layers.recompute import maybe_remat
from swinsmt_jax.models.network import Network
from swinsmt_jax.models.registry import NetworkConfig, broadcast_to_tuple, register
from swinsmt_jax.models.torch_names import UP_CONV, NameTable


@dataclass(frozen=True, kw_only=True)
class PyramidConfig(NetworkConfig):
    """What both of nnU-Net's networks decide.

    Attributes:
        features_per_stage: channels of each encoder stage; their number is the depth.
        strides: of each stage's first convolution, 1 or 2, one number or (D, H, W) for
            each stage; the first one is 1.
        kernel_sizes: of each stage, odd; one number, or for each stage a number or
            (D, H, W). Decoder stages have the kernel of their encoder stage.
        n_conv_per_stage_decoder: convolutions of each decoder stage, of which there is
            one fewer; one number or one each.
    """

    features_per_stage: checks.Positives = (32, 64, 128, 256, 320, 320)
    strides: tuple[checks.OneOrEach, ...] = (1, 2, 2, 2, 2, 2)
    kernel_sizes: tuple[checks.OneOrEach, ...] = (3,)
    n_conv_per_stage_decoder: checks.OneOrEach = 2

    def __post_init__(self):
        super().__post_init__()
        depth = len(self.features_per_stage)
        checks.require(
            depth >= 2,
            f"model.features_per_stage is {self.features_per_stage}, but must have at "
            "least 2 entries: a U-Net has a stage to come up from.",
        )
        checks.entries(depth)("model.strides", self.strides)
        broadcast_to_tuple(self, "kernel_sizes", depth)
        for name, choices in (("strides", (1, 2)), ("kernel_sizes", (1, 3))):
            sides = tuple(
                _sides(f"model.{name}", value, choices) for value in getattr(self, name)
            )
            object.__setattr__(self, name, sides)
        broadcast_to_tuple(self, "n_conv_per_stage_decoder", depth - 1)
        checks.require(
            self.strides[0] == 1,
            f"model.strides is {self.strides}, but must begin with 1: the logits have "
            "the grid of the first stage.",
        )

    @property
    def total_stride(self) -> int | tuple[int, ...]:
        """Divisor of every side of the input, or one for each side."""
        sides = [
            math.prod(axis) for axis in zip(*map(triple, self.strides), strict=True)
        ]
        return sides[0] if len(set(sides)) == 1 else tuple(sides)


def triple(value: int | Sequence[int]) -> tuple[int, ...]:
    """Return (D, H, W) of one number or three."""
    return (value,) * 3 if isinstance(value, int) else tuple(value)


def _sides(name, value, choices):
    """Return a number or (D, H, W) of different ones, each of them of `choices`."""
    sides = triple(value)
    checks.entries(3)(f"an entry of {name}", sides)
    for side in sides:
        checks.one_of(f"a side of {name}", side, choices)
    return sides[0] if len(set(sides)) == 1 else sides


@dataclass(frozen=True, kw_only=True)
class PlainConvUNetConfig(PyramidConfig):
    """Plain nnU-Net (Isensee et al. 2021): a U-Net of stacked convolutions.

    Attributes:
        n_conv_per_stage: convolutions of each encoder stage, one number or one each.
    """

    n_conv_per_stage: checks.OneOrEach = 2

    def __post_init__(self):
        super().__post_init__()
        broadcast_to_tuple(self, "n_conv_per_stage", len(self.strides))


@dataclass(frozen=True, kw_only=True)
class ResidualEncoderUNetConfig(PyramidConfig):
    """nnU-Net with a residual encoder (Isensee et al. 2024), presets M and L.

    The presets share this network and differ in the patch and batch that they plan.

    Attributes:
        n_blocks_per_stage: residual blocks of each encoder stage, one number or one
            each.
    """

    n_blocks_per_stage: checks.OneOrEach = (1, 3, 4, 6, 6, 6)
    n_conv_per_stage_decoder: checks.OneOrEach = 1

    def __post_init__(self):
        super().__post_init__()
        broadcast_to_tuple(self, "n_blocks_per_stage", len(self.strides))


class ConvNorm(nnx.Module):
    """Convolution and instance norm, then a leaky ReLU unless `activate` is false."""

    def __init__(
        self,
        channels: int,
        features: int,
        *,
        kernel_size: checks.OneOrEach,
        strides: checks.OneOrEach = 1,
        activate: bool = True,
        use_bias: bool = True,
        dtype: str,
        rngs: nnx.Rngs,
    ):
        self.activate = activate
        self.conv = Conv(
            channels,
            features,
            kernel_size=kernel_size,
            strides=strides,
            use_bias=use_bias,
            initializer=initializers.he_normal,
            dtype=dtype,
            rngs=rngs,
        )
        self.norm = InstanceNorm(features, dtype=dtype)

    def __call__(self, *parts: jax.Array) -> jax.Array:
        """Map [B, D, H, W, C] to [B, D/s, H/s, W/s, O]; several arrays as in `Conv`."""
        x = self.norm(self.conv(*parts))
        return leaky_relu(x) if self.activate else x


class ConvStack(nnx.Module):
    """`count` convolutions in a row; the first has the stride."""

    def __init__(
        self,
        channels: int,
        features: int,
        *,
        count: int,
        strides: checks.OneOrEach = 1,
        **common: Any,
    ):
        first = ConvNorm(channels, features, strides=strides, **common)
        rest = (ConvNorm(features, features, **common) for _ in range(count - 1))
        self.convs = nnx.List([first, *rest])

    def __call__(self, *parts: jax.Array) -> jax.Array:
        """Map [B, D, H, W, C] to [B, D/s, H/s, W/s, O]; several arrays as in `Conv`."""
        first, *rest = self.convs
        x = first(*parts)
        for conv in rest:
            x = conv(x)
        return x


class AveragePool(nnx.Module):
    """Mean of every block of `size` voxels, one number or (D, H, W)."""

    def __init__(self, size: int | tuple[int, ...]):
        self.size = triple(size)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Map [B, D, H, W, C] to [B, D/size, H/size, W/size, C]."""
        b, d, h, w, c = x.shape
        p, q, r = self.size
        blocks = x.reshape(b, d // p, p, h // q, q, w // r, r, c)
        return jnp.mean(blocks, axis=(2, 4, 6), dtype=jnp.float32).astype(x.dtype)


class ResidualConvs(nnx.Module):
    """Two convolutions and a shortcut, pooled and projected where the shape changes."""

    def __init__(
        self,
        channels: int,
        features: int,
        *,
        kernel_size: checks.OneOrEach,
        strides: checks.OneOrEach,
        **common: Any,
    ):
        common |= {"kernel_size": kernel_size}
        self.conv1 = ConvNorm(channels, features, strides=strides, **common)
        self.conv2 = ConvNorm(features, features, activate=False, **common)
        skip: list[nnx.Module] = [AveragePool(strides)] if strides != 1 else []
        if channels != features:
            common |= {"kernel_size": 1, "use_bias": False, "activate": False}
            skip.append(ConvNorm(channels, features, **common))
        self.skip = nnx.List(skip)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Map [B, D, H, W, C] to [B, D/s, H/s, W/s, O]."""
        y = self.conv2(self.conv1(x))
        for part in self.skip:
            x = part(x)
        return leaky_relu(y + x.astype(y.dtype))


class ResidualStack(nnx.Module):
    """`count` residual blocks in a row; the first has the stride."""

    def __init__(
        self,
        channels: int,
        features: int,
        *,
        count: int,
        strides: checks.OneOrEach,
        **common: Any,
    ):
        first = ResidualConvs(channels, features, strides=strides, **common)
        rest = (
            ResidualConvs(features, features, strides=1, **common)
            for _ in range(count - 1)
        )
        self.blocks = nnx.List([first, *rest])

    def __call__(self, x: jax.Array) -> jax.Array:
        """Map [B, D, H, W, C] to [B, D/s, H/s, W/s, O]."""
        for block in self.blocks:
            x = block(x)
        return x


class Encoder(nnx.Module):
    """Stages of convolutions or, behind a stem, of residual blocks."""

    def __init__(
        self,
        config: PlainConvUNetConfig | ResidualEncoderUNetConfig,
        *,
        rngs: nnx.Rngs,
    ):
        self.recompute = "encoder" in config.remat
        channels, features = config.in_channels, config.features_per_stage
        common: dict = {"dtype": config.dtype, "rngs": rngs}
        stage: type[ConvStack] | type[ResidualStack] = ConvStack
        stem = None
        if isinstance(config, ResidualEncoderUNetConfig):
            stage, counts = ResidualStack, checks.each(config.n_blocks_per_stage)
            stem = ConvStack(
                channels,
                features[0],
                count=1,
                kernel_size=config.kernel_sizes[0],
                **common,
            )
            channels = features[0]
        else:
            counts = checks.each(config.n_conv_per_stage)
        self.stem = stem
        self.stages = nnx.List(
            stage(before, after, count=n, strides=stride, kernel_size=kernel, **common)
            for before, after, n, stride, kernel in zip(
                (channels, *features[:-1]),
                features,
                counts,
                config.strides,
                config.kernel_sizes,
                strict=True,
            )
        )

    def __call__(self, x: jax.Array) -> list[jax.Array]:
        """Return the result of every stage, the finest first."""
        run = maybe_remat(self.recompute)
        x = x if self.stem is None else run(self.stem, x)
        results = []
        for i, stage in enumerate(self.stages):
            with jax.named_scope(f"encoder{i}"):
                x = run(stage, x)
            results.append(x)
        return results


class Decoder(nnx.Module):
    """Transposed convolution, concatenation with the skip, convolutions; and heads."""

    def __init__(self, config: PyramidConfig, *, rngs: nnx.Rngs):
        self.recompute = "decoder" in config.remat
        common: dict = {"dtype": config.dtype, "rngs": rngs}
        with_bias = {"use_bias": True, "initializer": initializers.he_normal, **common}
        features = config.features_per_stage[::-1]
        counts = checks.each(config.n_conv_per_stage_decoder)
        pairs = list(zip(features, features[1:], strict=False))
        self.stages = nnx.List(
            ConvStack(2 * finer, finer, count=count, kernel_size=kernel, **common)
            for (_, finer), count, kernel in zip(
                pairs, counts, config.kernel_sizes[-2::-1], strict=True
            )
        )
        self.transpconvs = nnx.List(
            UpConv(coarser, finer, strides=stride, **with_bias)
            for (coarser, finer), stride in zip(
                pairs, config.strides[:0:-1], strict=True
            )
        )
        self.seg_layers = nnx.List(
            Conv(finer, config.out_channels, kernel_size=1, **with_bias)
            for _, finer in pairs
        )

    def __call__(self, skips: list[jax.Array]) -> jax.Array:
        """Return the features of the finest stage."""

        def level(up, stage, x, skip):
            return stage(up(x), skip)

        run = nnx.remat(level) if self.recompute else level
        x = skips[-1]
        for i, skip in enumerate(skips[-2::-1]):
            with jax.named_scope(f"decoder{i}"):
                x = run(self.transpconvs[i], self.stages[i], x, skip)
        return x


class NNUNet(Network):
    """nnU-Net, plain or with a residual encoder, as the type of the config says."""

    def __init__(
        self,
        config: PlainConvUNetConfig | ResidualEncoderUNetConfig,
        *,
        rngs: nnx.Rngs,
    ):
        super().__init__(config)
        self.encoder = Encoder(config, rngs=rngs)
        self.decoder = Decoder(config, rngs=rngs)

    @property
    def head(self) -> Conv:
        """The last layer, from features to logits."""
        return self.decoder.seg_layers[-1]

    def features(self, x: jax.Array, *, rngs: nnx.Rngs | None = None) -> jax.Array:
        """Return what the head is applied to, [B, D, H, W, F]; nothing is random."""
        self.check_input(x)
        return self.decoder(self.encoder(x))


TORCH_NAMES = NameTable(
    renames=((r"^(encoder\.stages\.\d+)\.convs\.", r"\1.0.convs."),),
    layouts=((r"/transpconvs/\d+/kernel", UP_CONV),),
    aliases=(
        (r"(.*)\.conv\.(\w+)", r"\1.all_modules.0.\2"),
        (r"(.*)\.norm\.(\w+)", r"\1.all_modules.1.\2"),
        (r"encoder\.(.*)", r"decoder.encoder.\1"),
    ),
)
register(
    "nnunet_plain",
    PlainConvUNetConfig,
    NNUNet,
    torch_names=TORCH_NAMES,
    tiny={"features_per_stage": (4, 6), "strides": (1, 2), "n_conv_per_stage": 1},
)
register(
    "nnunet_resenc",
    ResidualEncoderUNetConfig,
    NNUNet,
    torch_names=TORCH_NAMES,
    tiny={
        "features_per_stage": (4, 6, 6),
        "strides": (1, 2, 1),
        "n_blocks_per_stage": 1,
    },
)
