"""Depthwise convolutions with large kernels, by the convolution theorem."""

import jax
import jax.numpy as jnp
from scipy.fft import next_fast_len


def depthwise_conv(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """Convolve every channel of [B, D, H, W, C] with its own kernel of [k, k, k, C].

    Odd kernels, stride 1, zero padded by half of the kernel. The sums are float32.
    Along an axis of n voxels the transforms have n + r entries, where r is the reach of
    the kernel, at most n - 1: taps further out meet padding alone, and what wraps
    around falls on the r entries that are cut off.
    """
    sides = x.shape[1:4]
    reach = [min(len(kernel) // 2, n - 1) for n in sides]
    taps = [slice(len(kernel) // 2 - r, len(kernel) // 2 + r + 1) for r in reach]
    pairs = zip(sides, reach, strict=True)
    lengths = tuple(next_fast_len(n + r, real=True) for n, r in pairs)
    # Channels first, since the transforms are of contiguous axes.
    kernel = jnp.moveaxis(kernel[tuple(taps)].astype(jnp.float32), -1, 0)
    kernel = jnp.pad(
        kernel,
        [(0, 0)] + [(0, n - k) for n, k in zip(lengths, kernel.shape[1:], strict=True)],
    )
    kernel = jnp.roll(kernel, [-r for r in reach], (1, 2, 3))  # the centre to 0
    spectrum = jnp.fft.rfftn(jnp.moveaxis(x, -1, 1).astype(jnp.float32), lengths)
    product = spectrum * jnp.conj(jnp.fft.rfftn(kernel, lengths))
    y = jnp.fft.irfftn(product, lengths)[(..., *(slice(n) for n in sides))]
    return jnp.moveaxis(y, 1, -1).astype(x.dtype)
