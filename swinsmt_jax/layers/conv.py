"""Convolution blocks of the U-shaped decoder: volumes [B, D, H, W, C]."""

import jax
import jax.numpy as jnp
from flax import nnx

from swinsmt_jax.layers import initializers
from swinsmt_jax.ops import convolution
from swinsmt_jax.ops.normalization import standardize


class Conv(nnx.Module):
    """Convolution of stride 1 with a cubic kernel of side 1 or 3, zero padded."""

    def __init__(
        self,
        channels: int,
        features: int,
        *,
        kernel_size: int,
        use_bias: bool = False,
        dtype: str = "float32",
        rngs: nnx.Rngs,
    ):
        if kernel_size not in (1, 3):
            raise ValueError(f"kernel_size is {kernel_size}, but must be 1 or 3.")
        self.dtype = dtype
        fan_in = channels * kernel_size**3
        shape = (kernel_size,) * 3 + (channels, features)
        self.kernel = initializers.uniform_fan_in(rngs, shape, fan_in=fan_in)
        self.bias = (
            initializers.uniform_fan_in(rngs, (features,), fan_in=fan_in)
            if use_bias
            else None
        )

    def __call__(self, x: jax.Array) -> jax.Array:
        """Map [B, D, H, W, C] to [B, D, H, W, O]."""
        x, kernel = x.astype(self.dtype), self.kernel[...].astype(self.dtype)
        y = (
            x @ kernel[0, 0, 0]
            if len(kernel) == 1
            else convolution.conv3x3x3(x, kernel)
        )
        return y if self.bias is None else y + self.bias[...].astype(self.dtype)


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
        return y + self.bias[...].astype(self.dtype)


class UpConv(nnx.Module):
    """Transposed convolution, kernel 2 and stride 2: doubles every side."""

    def __init__(
        self, channels: int, features: int, *, dtype: str = "float32", rngs: nnx.Rngs
    ):
        self.dtype = dtype
        # PyTorch takes the fan of a transposed convolution from its outputs.
        self.kernel = initializers.uniform_fan_in(
            rngs, (2, 2, 2, channels, features), fan_in=features * 8
        )

    def __call__(self, x: jax.Array) -> jax.Array:
        """Map [B, D, H, W, C] to [B, 2D, 2H, 2W, O]."""
        kernel = self.kernel[...].astype(self.dtype)
        return convolution.unpatchify(x.astype(self.dtype), kernel)


def instance_norm(x: jax.Array) -> jax.Array:
    """Standardise every channel of every sample over space, without parameters."""
    return standardize(x, (1, 2, 3)).astype(x.dtype)


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

    def __call__(self, x: jax.Array) -> jax.Array:
        """Map [B, D, H, W, C] to [B, D, H, W, O]."""
        y = leaky_relu(instance_norm(self.conv1(x)))
        y = instance_norm(self.conv2(y))
        shortcut = x if self.conv3 is None else instance_norm(self.conv3(x))
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
        x = self.transp_conv(x)
        return self.conv_block(jnp.concatenate([x, skip.astype(x.dtype)], axis=-1))
