"""Convolutions as pure functions: 3 x 3 x 3, and kernel = stride without overlap."""

import functools

import jax
import jax.numpy as jnp
from jax import lax


@jax.custom_vjp
def conv3x3x3(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """Convolve with a 3 x 3 x 3 kernel, stride 1, zero padding 1.

    XLA's 3-D convolution is slow on CPU, so there it is written over 2-D ones; every
    other platform gets the 3-D one. The choice is made when the program is lowered, so
    one exported program serves several platforms. Equal up to rounding.

    Args:
        x: [B, D, H, W, C].
        kernel: [3, 3, 3, C, O].

    Returns:
        [B, D, H, W, O] in the dtype of `x`.
    """
    return lax.platform_dependent(x, kernel, cpu=_over_2d, default=_direct)


def _forward(x, kernel):
    return conv3x3x3(x, kernel), (x, kernel)


def _backward(saved, cotangent):
    x, kernel = saved
    flipped = kernel[::-1, ::-1, ::-1].swapaxes(3, 4)
    dx = lax.platform_dependent(cotangent, flipped, cpu=_over_2d, default=_direct)
    dkernel = lax.platform_dependent(
        x,
        kernel,
        cotangent,
        cpu=functools.partial(_kernel_gradient, _tap_by_tap),
        default=functools.partial(_kernel_gradient, _direct),
    )
    return dx, dkernel


conv3x3x3.defvjp(_forward, _backward)


def _kernel_gradient(convolve, x, kernel, cotangent):
    _, pullback = jax.vjp(lambda k: convolve(x, k), kernel)
    return pullback(cotangent)[0]


def _direct(x, kernel):
    return lax.conv_general_dilated(
        x, kernel, (1, 1, 1), "SAME", dimension_numbers=("NDHWC", "DHWIO", "NDHWC")
    )


def _conv_2d(x, kernel):
    return lax.conv_general_dilated(
        x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )


def _over_2d(x, kernel):
    """One 2-D convolution to 3 O channels, depth as batch; then shift and add."""
    b, d, h, w, c = x.shape
    out = kernel.shape[-1]
    planes = jnp.transpose(kernel, (1, 2, 3, 0, 4)).reshape(3, 3, c, 3 * out)
    y = _conv_2d(x.reshape(b * d, h, w, c), planes).reshape(b, d, h, w, 3, out)
    return _add_taps(y[..., 0, :], y[..., 1, :], y[..., 2, :])


def _tap_by_tap(x, kernel):
    """Three 2-D convolutions, whose kernel gradient is the cheapest on CPU."""
    b, d, h, w, c = x.shape
    planes = x.reshape(b * d, h, w, c)
    taps = [_conv_2d(planes, kernel[i]).reshape(b, d, h, w, -1) for i in range(3)]
    return _add_taps(*taps)


def _add_taps(before, centre, after):
    zero = jnp.zeros_like(centre[:, :1])
    return (
        centre
        + jnp.concatenate([zero, before[:, :-1]], axis=1)
        + jnp.concatenate([after[:, 1:], zero], axis=1)
    )


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


def unpatchify(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """Transposed convolution with stride equal to the kernel, as one matrix product.

    Args:
        x: [B, D, H, W, C].
        kernel: [p, q, r, C, O], not flipped (as in PyTorch).

    Returns:
        [B, D p, H q, W r, O].
    """
    b, d, h, w, _ = x.shape
    p, q, r, _, out = kernel.shape
    y = jnp.einsum("bxyzc,pqrco->bxpyqzro", x, kernel)
    return y.reshape(b, d * p, h * q, w * r, out)
