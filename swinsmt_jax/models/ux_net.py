"""3D UX-Net (Lee et al. 2023): large depthwise kernels in place of window attention."""

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import jax
import jax.numpy as jnp
from flax import nnx

from swinsmt_jax import checks
from swinsmt_jax.layers import initializers
from swinsmt_jax.layers.conv import Conv, PatchConv, ResidualBlock, UpBlock
from swinsmt_jax.layers.linear import LayerNorm, drop_path, fold_in, gelu
from swinsmt_jax.layers.recompute import maybe_remat
from swinsmt_jax.models.network import Network, dropout_key
from swinsmt_jax.models.registry import NetworkConfig, PerStage, register
from swinsmt_jax.models.torch_names import (
    MONAI_LAYOUTS,
    MONAI_RENAMES,
    Layout,
    NameTable,
)
from swinsmt_jax.ops import by_platform

KERNEL = 7
EXPANSION = 4
EPSILON = 1e-6  # of the encoder's layer norms


@dataclass(frozen=True, kw_only=True)
class StagesConfig(NetworkConfig):
    """What 3D UX-Net and its relatives share.

    Attributes:
        depths: blocks of each of the four stages.
        feat_size: channels of each stage.
        hidden_size: channels at the bottom of the decoder.
    """

    depths: PerStage = (2, 2, 2, 2)
    feat_size: PerStage = (48, 96, 192, 384)
    hidden_size: checks.Positive = 768

    total_stride: ClassVar = 16


@dataclass(frozen=True, kw_only=True)
class UXNetConfig(StagesConfig):
    """3D UX-Net (Lee et al. 2023): large-kernel depthwise convolutions as encoder.

    Attributes:
        drop_path_rate: stochastic depth, rising linearly from 0 to this rate.
        layer_scale_init_value: initial value of the blocks' layer scale.
    """

    drop_path_rate: checks.Share = 0.0
    layer_scale_init_value: float = 1e-6

    def __post_init__(self):
        super().__post_init__()
        checks.require(
            self.layer_scale_init_value > 0,
            f"model.layer_scale_init_value is {self.layer_scale_init_value}, but must "
            "be positive: a block scaled by 0 learns nothing.",
        )


class DepthwiseConv(nnx.Module):
    """A cubic kernel and a bias for each channel."""

    def __init__(
        self,
        channels: int,
        *,
        kernel_size: int = KERNEL,
        dtype: str,
        rngs: nnx.Rngs,
    ):
        self.dtype = dtype
        taps = kernel_size**3
        self.kernel = initializers.uniform_fan_in(
            rngs, (kernel_size,) * 3 + (channels,), fan_in=taps
        )
        self.bias = initializers.uniform_fan_in(rngs, (channels,), fan_in=taps)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Map [B, D, H, W, C] to the same shape."""
        kernel = self.kernel[...].astype(self.dtype)
        y = by_platform.depthwise_conv(x.astype(self.dtype), kernel)
        return y + self.bias[...].astype(self.dtype)


class Scaling(nnx.Module):
    """Pointwise convolution in groups of one channel: C to C r, or `back` to C."""

    def __init__(self, channels: int, *, back: bool, dtype: str, rngs: nnx.Rngs):
        self.back = back
        self.dtype = dtype
        fan_in = EXPANSION if back else 1
        features = channels if back else EXPANSION * channels
        self.kernel = initializers.uniform_fan_in(
            rngs, (channels, EXPANSION), fan_in=fan_in
        )
        self.bias = initializers.uniform_fan_in(rngs, (features,), fan_in=fan_in)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Map [..., C] to [..., C r], or [..., C r] to [..., C]."""
        kernel = self.kernel[...].astype(self.dtype)
        bias = self.bias[...].astype(self.dtype)
        if self.back:
            x = x.reshape(*x.shape[:-1], -1, EXPANSION)
            return jnp.sum(x * kernel, axis=-1) + bias
        y = x[..., None] * kernel
        return y.reshape(*x.shape[:-1], -1) + bias


class UXBlock(nnx.Module):
    """Depthwise convolution, layer norm, and a scaling per channel; added."""

    def __init__(
        self, channels: int, *, number: int, config: UXNetConfig, rngs: nnx.Rngs
    ):
        step = config.drop_path_rate / max(1, sum(config.depths) - 1)
        self.drop_path_rate = step * number
        dtype = config.dtype
        self.dwconv = DepthwiseConv(channels, dtype=dtype, rngs=rngs)
        self.norm = LayerNorm(channels, epsilon=EPSILON, dtype=dtype)
        self.pwconv1 = Scaling(channels, back=False, dtype=dtype, rngs=rngs)
        self.pwconv2 = Scaling(channels, back=True, dtype=dtype, rngs=rngs)
        self.gamma = initializers.constant(config.layer_scale_init_value, (channels,))

    def __call__(self, x: jax.Array, key: jax.Array | None) -> jax.Array:
        """Map [B, D, H, W, C] to the same shape."""
        y = self.pwconv1(self.norm(self.dwconv(x)))
        y = self.pwconv2(gelu(y)) * self.gamma[...].astype(x.dtype)
        return x + drop_path(y, rate=self.drop_path_rate, key=key)


class UXEncoder(nnx.Module):
    """Four stages of blocks, each after a convolution that halves the grid.

    Args:
        config: of the network.
        block: called as block(channels, number=of all blocks, config=, rngs=); what it
            returns maps a volume and a key, which is None outside of training.
        rngs: initialises the parameters.
    """

    def __init__(self, config: StagesConfig, *, block: Callable, rngs: nnx.Rngs):
        self.recompute = "encoder" in config.remat
        sizes, dtype = config.feat_size, config.dtype

        def norm(channels):
            return LayerNorm(channels, epsilon=EPSILON, dtype=dtype)

        def halve(channels, features):
            return PatchConv(channels, features, patch_size=2, dtype=dtype, rngs=rngs)

        stem = Conv(
            config.in_channels,
            sizes[0],
            kernel_size=KERNEL,
            strides=2,
            use_bias=True,
            dtype=dtype,
            rngs=rngs,
        )
        downs = [[stem, norm(sizes[0])]]
        for before, after in zip(sizes, sizes[1:], strict=False):
            downs.append([norm(before), halve(before, after)])
        self.downsample_layers = nnx.List(map(nnx.List, downs))
        numbers = itertools.count()
        self.stages = nnx.List(
            nnx.List(
                block(size, number=next(numbers), config=config, rngs=rngs)
                for _ in range(depth)
            )
            for size, depth in zip(sizes, config.depths, strict=True)
        )
        for i, size in enumerate(sizes):
            setattr(self, f"norm{i}", norm(size))

    def __call__(
        self, x: jax.Array, *, key: jax.Array | None = None
    ) -> list[jax.Array]:
        """Return the normed results of the stages, at 1/2, 1/4, 1/8 and 1/16."""
        run, results, number = maybe_remat(self.recompute), [], 0
        for i, (down, blocks) in enumerate(
            zip(self.downsample_layers, self.stages, strict=True)
        ):
            with jax.named_scope(f"stage{i}"):
                for layer in down:
                    x = run(layer, x)
                for block in blocks:
                    x = run(block, x, fold_in(key, number))
                    number += 1
                results.append(getattr(self, f"norm{i}")(x))
        return results


class UXNet(Network):
    """3D UX-Net, or a network that differs only in its `block`."""

    def __init__(
        self, config: StagesConfig, *, block: Callable = UXBlock, rngs: nnx.Rngs
    ):
        super().__init__(config)
        sizes = (config.in_channels, *config.feat_size, config.hidden_size)
        first = sizes[1]
        common: dict = {"dtype": config.dtype, "rngs": rngs}
        self.uxnet_3d = UXEncoder(config, block=block, rngs=rngs)
        for i in range(1, 6):
            block = ResidualBlock(sizes[i - 1], sizes[i], **common)
            setattr(self, f"encoder{i}", block)
        for i in range(2, 6):
            setattr(self, f"decoder{i}", UpBlock(sizes[i], sizes[i - 1], **common))
        self.decoder1 = ResidualBlock(first, first, **common)
        self.out = Conv(
            first, config.out_channels, kernel_size=1, use_bias=True, **common
        )

    def features(self, x: jax.Array, *, rngs: nnx.Rngs | None = None) -> jax.Array:
        """Return what the head is applied to, [B, D, H, W, F]."""
        self.check_input(x)
        stages = [x, *self.uxnet_3d(x, key=dropout_key(rngs))]
        run = maybe_remat("encoder" in self.config.remat)
        with jax.named_scope("encoder"):
            *skips, y = (
                run(getattr(self, f"encoder{i + 1}"), stage)
                for i, stage in enumerate(stages)
            )
        run = maybe_remat("decoder" in self.config.remat)
        for level in (5, 4, 3, 2):
            with jax.named_scope(f"decoder{level}"):
                y = run(getattr(self, f"decoder{level}"), y, skips[level - 2])
        with jax.named_scope("decoder1"):
            y = run(self.decoder1, y)
        return y


# One kernel a channel: [k, k, k, C] -> [C, 1, k, k, k].
DEPTHWISE = Layout(
    lambda a: a.transpose(3, 0, 1, 2)[:, None],
    lambda a, shape: a[:, 0].transpose(1, 2, 3, 0),
)
# Of one channel to r, [C, r] -> [C r, 1, 1, 1, 1]; and back, [C, r, 1, 1, 1].
_WIDEN = Layout(lambda a: a.reshape(-1, 1, 1, 1, 1), lambda a, shape: a.reshape(shape))
_NARROW = Layout(lambda a: a[:, :, None, None, None], lambda a, shape: a.reshape(shape))
TORCH_NAMES = NameTable(
    renames=MONAI_RENAMES,
    layouts=(
        (r"/dwconv/kernel", DEPTHWISE),
        (r"/pwconv1/kernel", _WIDEN),
        (r"/pwconv2/kernel", _NARROW),
        *MONAI_LAYOUTS,
    ),
)
register(
    "ux_net",
    UXNetConfig,
    UXNet,
    torch_names=TORCH_NAMES,
    tiny={"depths": (1, 1, 1, 1), "feat_size": (2, 3, 3, 4), "hidden_size": 4},
)
