"""Strided convolutions on a CPU, where XLA's gradient of them is slow.

Every axis of stride 2 is folded into the channels, and what remains is written over
2-D convolutions of stride 1.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax


def strided_conv(
    x: jax.Array, kernel: jax.Array, *, strides: tuple[int, ...]
) -> jax.Array:
    """Convolve [B, D, H, W, C] with [p, q, r, C, O]: see `convolution.strided_conv`."""
    x = _fold(x, strides)
    kernel, padding = _fold_kernel(kernel, strides)
    b, d, h, w, c = x.shape
    x = jnp.pad(x, ((0, 0), padding[0], (0, 0), (0, 0), (0, 0)))
    planes = (
        lax.conv_general_dilated(
            x[:, i : i + d].reshape(b * d, h, w, c),
            taps,
            (1, 1),
            padding[1:],
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )
        for i, taps in enumerate(kernel)
    )
    return functools.reduce(jnp.add, planes).reshape(b, d, h, w, -1)


def _fold(x, strides):
    """Space to depth: [B, D, H, W, C] -> [B, D / s, H / s, W / s, s s s C]."""
    b, d, h, w, c = x.shape
    p, q, r = strides
    x = x.reshape(b, d // p, p, h // q, q, w // r, r, c)
    x = jnp.einsum("bxpyqzrc->bxyzpqrc", x)
    return x.reshape(b, d // p, h // q, w // r, p * q * r * c)


def _fold_kernel(kernel, strides):
    """Kernel of the folded input, and its padding: taps before and after the centre."""
    padding = []
    for axis, stride in enumerate(strides):
        half = kernel.shape[axis] // 2
        before = -(-half // stride)  # folded taps that reach before the centre
        front = stride * before - half
        taps = -(-(kernel.shape[axis] + front) // stride)
        back = stride * taps - kernel.shape[axis] - front
        widths = [(0, 0)] * 5
        widths[axis] = (front, back)
        kernel = jnp.pad(kernel, widths)
        padding.append((before, taps - 1 - before))
    p, q, r = strides
    x, y, z, c, out = kernel.shape
    kernel = kernel.reshape(x // p, p, y // q, q, z // r, r, c, out)
    kernel = jnp.einsum("xpyqzrco->xyzpqrco", kernel)
    return kernel.reshape(x // p, y // q, z // r, p * q * r * c, out), padding
