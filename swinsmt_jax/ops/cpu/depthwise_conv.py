"""Depthwise convolutions on a CPU, where XLA's grouped 3-D convolution takes seconds.

The kernel's taps are multiplied with shifted views and added; the gradient in the
kernel is a matrix product for each line of taps. The sums are float32.
"""

import jax
import jax.numpy as jnp
from jax import lax


def depthwise_conv(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """Convolve [B, D, H, W, C] with [k, k, k, C], stride 1, zero padded."""
    b, d, h, w, c = x.shape
    k = len(kernel)
    padded = jnp.pad(x, ((0, 0), *((k // 2, k // 2),) * 3, (0, 0)))

    def add_plane(total, depth):
        plane = lax.dynamic_slice_in_dim(padded, depth, d, axis=1)
        for i in range(k):
            for j in range(k):
                tap = kernel[depth, i, j].astype(jnp.float32)
                total = total + plane[:, :, i : i + h, j : j + w] * tap
        return total, None

    total = jnp.zeros(x.shape, jnp.float32)
    return lax.scan(add_plane, total, jnp.arange(k))[0].astype(x.dtype)


def kernel_gradient(x: jax.Array, kernel: jax.Array, cotangent: jax.Array) -> jax.Array:
    """For each line of taps, multiply all columns; the taps are the diagonals."""
    b, d, h, w, c = x.shape
    k = len(kernel)
    padded = jnp.pad(x, ((0, 0), *((k // 2, k // 2),) * 3, (0, 0)))
    columns = padded.transpose(4, 0, 1, 2, 3)
    cotangent = cotangent.transpose(4, 0, 1, 2, 3)

    def line(_, index):
        start = (0, 0, index // k, index % k, 0)
        part = lax.dynamic_slice(columns, start, (c, b, d, h, columns.shape[-1]))
        products = jnp.einsum(
            "cbdhi,cbdhj->cij", part, cotangent, preferred_element_type=jnp.float32
        )
        taps = [jnp.trace(products[:, i : i + w], axis1=1, axis2=2) for i in range(k)]
        return None, jnp.stack(taps)

    taps = lax.scan(line, None, jnp.arange(k * k))[1]
    return taps.reshape(k, k, k, c).astype(kernel.dtype)
