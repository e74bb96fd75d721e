"""Strided convolutions on a CPU.

XLA's gradient of a strided convolution is slow there. So every axis of stride 2 is
folded into the channels, and what remains is written over 2-D convolutions of stride 1.
Folded as a whole, the input is copied several times: only the gradient, which has those
copies anyway, is derived from that form.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax

from swinsmt_jax.ops.cpu.convolution import conv_2d, conv_in_strips


def plane_by_plane(
    x: jax.Array, kernel: jax.Array, *, strides: tuple[int, ...]
) -> jax.Array:
    """Convolve as `at_once` does, and fold only the planes that a result needs."""
    depth = x.shape[1] // strides[0]
    kernel, padding = _fold_kernel(kernel, strides)
    taps = jnp.concatenate(list(kernel), axis=2)

    def folded(index):
        planes = lax.dynamic_slice_in_dim(
            x, strides[0] * jnp.clip(index, 0, depth - 1), strides[0], axis=1
        )
        inside = (index >= 0) & (index < depth)
        return jnp.where(inside, _fold(planes, strides)[:, 0], 0)

    def plane(index, y):
        first = index - padding[0][0]
        near = [folded(first + i) for i in range(len(kernel))]
        one = conv_in_strips(jnp.concatenate(near, axis=-1), taps, padding[1:])
        return lax.dynamic_update_slice_in_dim(y, one[:, None], index, axis=1)

    sides = (size // stride for size, stride in zip(x.shape[1:4], strides, strict=True))
    shape = (x.shape[0], *sides, kernel.shape[-1])
    # Made of `x`, and not a constant: see `convolution.convolve`.
    buffer = jnp.broadcast_to(x[:, :1, :1, :1, :1], shape)
    return lax.fori_loop(0, depth, plane, buffer)


def at_once(x: jax.Array, kernel: jax.Array, *, strides: tuple[int, ...]) -> jax.Array:
    """Convolve [B, D, H, W, C] with [p, q, r, C, O], all planes at once."""
    x = _fold(x, strides)
    kernel, padding = _fold_kernel(kernel, strides)
    b, d, h, w, c = x.shape
    x = jnp.pad(x, ((0, 0), padding[0], (0, 0), (0, 0), (0, 0)))
    planes = (
        conv_2d(x[:, i : i + d].reshape(b * d, h, w, c), taps, padding[1:])
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
