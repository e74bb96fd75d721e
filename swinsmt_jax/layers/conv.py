"""Convolution blocks of the U-shaped decoder: volumes [B, D, H, W, C]."""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx

from swinsmt_jax.layers import initializers
from swinsmt_jax.ops import by_platform, convolution
from swinsmt_jax.ops.normalization import standardize

Initializer = Callable[..., nnx.Param]


class Conv(nnx.Module):
    """Convolution with an odd kernel, zero padded by half of it.

    Args:
        channels, features: of input and output.
        kernel_size: one number or (D, H, W); 1 and 3 have stride 1 forms.
        strides: one number or (D, H, W), each 1 or 2.
        use_bias: whether there is a bias.
        initializer: of kernel and bias, from `layers.initializers`.
        dtype: of the convolution.
        rngs: initialises the parameters.
    """

    def __init__(
        self,
        channels: int,
        features: int,
        *,
        kernel_size: int | convolution.Sides,
        strides: int | convolution.Sides = 1,
        use_bias: bool = False,
        initializer: Initializer = initializers.uniform_fan_in,
        dtype: str = "float32",
        rngs: nnx.Rngs,
    ):
        sides, self.strides = _triple(kernel_size), _triple(strides)
        if self.strides == (1, 1, 1) and not set(sides) <= {1, 3}:
            raise ValueError(f"kernel_size is {kernel_size}, but must be 1 or 3.")
        self.dtype = dtype
        fan_in = channels * math.prod(sides)
        self.kernel = initializer(rngs, (*sides, channels, features), fan_in=fan_in)
        self.bias = _bias(
            features, initializer, fan_in=fan_in, rngs=rngs, wanted=use_bias
        )

    def __call__(self, *parts: jax.Array) -> jax.Array:
        """Map [B, D, H, W, C] to [B, D/s, H/s, W/s, O].

        Several arrays stand side by side along the channels. Where the platform has a
        form for that, they are not copied.
        """
        kernel = self.kernel[...].astype(self.dtype)
        parts = tuple(part.astype(self.dtype) for part in parts)
        sides = kernel.shape[:3]
        if self.strides == (1, 1, 1) and sides == (1, 1, 1):
            y = by_platform.pointwise_conv(*parts, kernel[0, 0, 0])
        elif self.strides == (1, 1, 1) and sides == (3, 3, 3):
            y = by_platform.conv3x3x3(*parts, kernel)
        else:
            x = jnp.concatenate(parts, axis=-1)
            if self.strides == (1, 1, 1):
                y = by_platform.flat_conv(x, kernel)
            else:
                y = by_platform.strided_conv(x, kernel, self.strides)
        return y if self.bias is None else convolution.add_bias(y, self.bias[...])


class PatchConv(nnx.Module):
    """Convolution with stride = kernel: [B, D, H, W, C] -> [B, D/p, H/p, W/p, O]."""

    def __init__(
        self,
        channels: int,
        features: int,
        *,
        patch_size: int,
        dtype: str = "float32",
        rngs: nnx.Rngs,
    ):
        self.dtype = dtype
        fan_in = channels * patch_size**3
        shape = (patch_size,) * 3 + (channels, features)
        self.kernel = initializers.uniform_fan_in(rngs, shape, fan_in=fan_in)
        self.bias = initializers.uniform_fan_in(rngs, (features,), fan_in=fan_in)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Embed the patches of `x`."""
        kernel = self.kernel[...].astype(self.dtype)
        y = convolution.patchify(x.astype(self.dtype), kernel)
        return convolution.add_bias(y, self.bias[...])


class UpConv(nnx.Module):
    """Transposed convolution with kernel = stride: multiplies every side.

    Args:
        channels, features: of input and output.
        strides: one number or (D, H, W).
        use_bias, initializer, dtype, rngs: as in `Conv`.
    """

    def __init__(
        self,
        channels: int,
        features: int,
        *,
        strides: int | convolution.Sides = 2,
        use_bias: bool = False,
        initializer: Initializer = initializers.uniform_fan_in,
        dtype: str = "float32",
        rngs: nnx.Rngs,
    ):
        factors = _triple(strides)
        self.dtype = dtype
        # PyTorch takes the fan of a transposed convolution from its outputs.
        fan_in = features * math.prod(factors)
        self.kernel = initializer(rngs, (*factors, channels, features), fan_in=fan_in)
        self.bias = _bias(
            features, initializer, fan_in=fan_in, rngs=rngs, wanted=use_bias
        )

    def __call__(self, x: jax.Array) -> jax.Array:
        """Map [B, D, H, W, C] to [B, D s, H s, W s, O]."""
        kernel = self.kernel[...].astype(self.dtype)
        bias = () if self.bias is None else (self.bias[...],)
        return by_platform.up_conv(x.astype(self.dtype), kernel, *bias)


def _triple(sides):
    return (sides,) * 3 if isinstance(sides, int) else tuple(sides)


def _bias(features, initializer, *, fan_in, rngs, wanted):
    """PyTorch's default draws biases too; every other initialisation zeroes them."""
    if not wanted:
        return None
    if initializer is initializers.uniform_fan_in:
        return initializer(rngs, (features,), fan_in=fan_in)
    return initializers.constant(0.0, (features,))


def instance_norm(x: jax.Array) -> jax.Array:
    """Standardise every channel of every sample over space, without parameters."""
    return standardize(x, (1, 2, 3)).astype(x.dtype)


class InstanceNorm(nnx.Module):
    """Instance norm with scale and bias; statistics in float32, result in `dtype`."""

    def __init__(self, channels: int, *, dtype: str = "float32"):
        self.dtype = dtype
        self.scale = initializers.constant(1.0, (channels,))
        self.bias = initializers.constant(0.0, (channels,))

    def __call__(self, x: jax.Array) -> jax.Array:
        """Return the standardised, scaled and moved [B, D, H, W, C]."""
        y = standardize(x, (1, 2, 3)) * self.scale[...] + self.bias[...]
        return y.astype(self.dtype)


class BatchNorm(nnx.Module):
    """Batch norm with scale and bias (Ioffe and Szegedy 2015), as in PyTorch.

    Training standardises by the mean and the biased variance of all samples and voxels,
    of all devices too, and moves the running mean and unbiased variance, by which
    everything else standardises. Statistics are float32, the result is in `dtype`.
    """

    def __init__(self, channels: int, *, dtype: str = "float32"):
        self.dtype = dtype
        self.scale = initializers.constant(1.0, (channels,))
        self.bias = initializers.constant(0.0, (channels,))
        self.running_mean = nnx.BatchStat(initializers.filled(0.0)(None, (channels,)))
        self.running_var = nnx.BatchStat(initializers.filled(1.0)(None, (channels,)))

    def __call__(self, x: jax.Array, *, training: bool) -> jax.Array:
        """Return the standardised, scaled and moved [B, D, H, W, C]."""
        if training:
            self._follow(jax.lax.stop_gradient(x.astype(jnp.float32)))
            y = standardize(x, (0, 1, 2, 3))
        else:
            scale = jax.lax.rsqrt(self.running_var[...] + 1e-5)
            y = (x.astype(jnp.float32) - self.running_mean[...]) * scale
        return (y * self.scale[...] + self.bias[...]).astype(self.dtype)

    def _follow(self, x):
        """Move the running statistics by a tenth of the way to those of a batch."""
        count = x.size // x.shape[-1]
        variance = x.var((0, 1, 2, 3)) * count / max(1, count - 1)
        for running, found in (
            (self.running_mean, x.mean((0, 1, 2, 3))),
            (self.running_var, variance),
        ):
            running[...] = 0.9 * running[...] + 0.1 * found


def leaky_relu(x: jax.Array) -> jax.Array:
    """Leaky ReLU with slope 0.01."""
    return jnp.where(x >= 0, x, 0.01 * x)


class ResidualBlock(nnx.Module):
    """Two 3 x 3 x 3 convolutions with instance norm, and a shortcut.

    The shortcut is a normed 1 x 1 x 1 convolution where the channels change.
    """

    def __init__(
        self, channels: int, features: int, *, dtype: str = "float32", rngs: nnx.Rngs
    ):
        def conv(inputs, size):
            return Conv(inputs, features, kernel_size=size, dtype=dtype, rngs=rngs)

        self.conv1 = conv(channels, 3)
        self.conv2 = conv(features, 3)
        self.conv3 = conv(channels, 1) if channels != features else None

    def __call__(self, *parts: jax.Array) -> jax.Array:
        """Map [B, D, H, W, C] to [B, D, H, W, O]; several arrays as in `Conv`."""
        y = leaky_relu(instance_norm(self.conv1(*parts)))
        y = instance_norm(self.conv2(y))
        if self.conv3 is None:
            shortcut = jnp.concatenate(parts, axis=-1)
        else:
            shortcut = instance_norm(self.conv3(*parts))
        return leaky_relu(y + shortcut.astype(y.dtype))


class UpBlock(nnx.Module):
    """Double the grid, join with the skip connection, refine by a residual block."""

    def __init__(
        self, channels: int, features: int, *, dtype: str = "float32", rngs: nnx.Rngs
    ):
        self.transp_conv = UpConv(channels, features, dtype=dtype, rngs=rngs)
        self.conv_block = ResidualBlock(2 * features, features, dtype=dtype, rngs=rngs)

    def __call__(self, x: jax.Array, skip: jax.Array) -> jax.Array:
        """Map [B, D, H, W, C] and a skip [B, 2D, 2H, 2W, O] to [B, 2D, 2H, 2W, O]."""
        return self.conv_block(self.transp_conv(x), skip)
