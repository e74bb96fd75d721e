"""Plain convolutions of volumes. `by_platform` has what networks call."""

import jax
import jax.numpy as jnp
from jax import lax

Sides = tuple[int, ...]  # of a kernel, or strides: (D, H, W)


def conv(
    x: jax.Array, kernel: jax.Array, *, strides: Sides = (1, 1, 1), groups: int = 1
) -> jax.Array:
    """Convolve [B, D, H, W, C] with an odd [p, q, r, C / groups, O], zero padded.

    The padding is half of the kernel: sides that the strides divide become 1 / stride
    as long.
    """
    return lax.conv_general_dilated(
        x,
        kernel,
        strides,
        [(side // 2, side // 2) for side in kernel.shape[:3]],
        dimension_numbers=("NDHWC", "DHWIO", "NDHWC"),
        feature_group_count=groups,
    )


def depthwise_conv(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """Convolve every channel of [B, D, H, W, C] with its own kernel of [k, k, k, C]."""
    return conv(x, kernel[:, :, :, None], groups=x.shape[-1])


def patchify(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """Convolve with stride equal to the kernel, as one matrix product.

    Args:
        x: [B, D, H, W, C], sides multiples of the kernel's.
        kernel: [p, q, r, C, O].

    Returns:
        [B, D/p, H/q, W/r, O].
    """
    b, d, h, w, c = x.shape
    p, q, r = kernel.shape[:3]
    x = x.reshape(b, d // p, p, h // q, q, w // r, r, c)
    return jnp.einsum("bxpyqzrc,pqrco->bxyzo", x, kernel)


def unpatchify(
    x: jax.Array, kernel: jax.Array, bias: jax.Array | None = None
) -> jax.Array:
    """Transposed convolution with stride equal to the kernel, as one matrix product.

    Args:
        x: [B, D, H, W, C].
        kernel: [p, q, r, C, O], not flipped (as in PyTorch).
        bias: [O], if there is one.

    Returns:
        [B, D p, H q, W r, O].
    """
    b, d, h, w, _ = x.shape
    p, q, r, _, out = kernel.shape
    y = jnp.einsum("bxyzc,pqrco->bxpyqzro", x, kernel)
    y = y.reshape(b, d * p, h * q, w * r, out)
    return y if bias is None else add_bias(y, bias)


def add_bias(y: jax.Array, bias: jax.Array) -> jax.Array:
    """Add the bias [O] rounded to the dtype of `y`; its gradient is a float32 sum."""
    bias = bias.astype(y.dtype).astype(jnp.float32)
    return (y + bias).astype(y.dtype)
