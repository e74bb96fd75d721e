"""3 x 3 x 3 convolutions for CPUs, as 2-D convolutions and matrix products.

XLA's 3-D convolution is several times slower there, and the gradient in its kernel
more than ten times. benchmarks/NOTES.md has the figures.
"""

import jax
import jax.numpy as jnp
from jax import lax

# Rows of a plane from which one plane at a time beats all at once: below, the loop
# costs more than the memory traffic that it saves.
LARGE_PLANE = 64 * 64
ROWS = 4096  # of the products that make the gradient in the kernel; fit into a cache


def convolve(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """Convolve [B, D, H, W, C] with [3, 3, 3, C, O], stride 1, zero padding 1."""
    if x.shape[2] * x.shape[3] >= LARGE_PLANE:
        return _plane_by_plane(x, kernel)
    return at_once(x, kernel)


def at_once(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """Convolve with [p, q, r, C, O], sides 1 or 3, stride 1, zero padded by half.

    One 2-D convolution to p O channels, depth as batch; then shift and add.
    """
    b, d, h, w, c = x.shape
    p, q, r, _, out = kernel.shape
    planes = jnp.transpose(kernel, (1, 2, 3, 0, 4)).reshape(q, r, c, p * out)
    y = _conv_2d(x.reshape(b * d, h, w, c), planes).reshape(b, d, h, w, p, out)
    if p == 1:
        return y[..., 0, :]
    before, centre, after = y[..., 0, :], y[..., 1, :], y[..., 2, :]
    zero = jnp.zeros_like(centre[:, :1])
    return (
        centre
        + jnp.concatenate([zero, before[:, :-1]], axis=1)
        + jnp.concatenate([after[:, 1:], zero], axis=1)
    )


def _plane_by_plane(x, kernel):
    """For each plane, a 2-D convolution of it and its neighbours, 3 C channels."""
    planes = jnp.transpose(kernel, (1, 2, 0, 3, 4)).reshape(3, 3, 3 * x.shape[-1], -1)

    def plane(index, y):
        three = _planes(x, index, 1)
        three = jnp.concatenate([three[:, i] for i in range(3)], axis=-1)
        one = _conv_2d(three, planes)[:, None]
        return lax.dynamic_update_slice_in_dim(y, one, index, axis=1)

    # Made of `x`: XLA makes constants at the start of the program, where they take
    # memory until they are used.
    shape = (*x.shape[:-1], kernel.shape[-1])
    buffer = jnp.broadcast_to(x[:, :1, :1, :1, :1], shape)
    return lax.fori_loop(0, x.shape[1], plane, buffer)


def _conv_2d(x, kernel):
    return lax.conv_general_dilated(
        x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )


def kernel_gradient(x: jax.Array, kernel: jax.Array, cotangent: jax.Array) -> jax.Array:
    """Gradient in the kernel of a 3 x 3 x 3 convolution.

    For a few planes at a time, the 9 shifts within a plane of the operand with fewer
    channels are laid side by side, and multiplied with the other one's planes before,
    at and after them. The sums are float32.

    Args:
        x: [B, D, H, W, C].
        kernel: [3, 3, 3, C, O].
        cotangent: [B, D, H, W, O] of the convolution's result.

    Returns:
        [3, 3, 3, C, O] in the kernel's dtype.
    """
    b, d, h, w, c = x.shape
    o = cotangent.shape[-1]
    shifts_x = c < o
    fitting = [n for n in range(1, d + 1) if d % n == 0 and n * h * w <= ROWS]
    depth = max(fitting, default=1)

    def add(total, start):
        ours = _planes(x, start, depth)
        theirs = lax.dynamic_slice_in_dim(cotangent, start, depth, axis=1)
        if shifts_x:
            ours = _shifts(ours)
        else:
            theirs = _shifts(theirs)
        return total + _depth_taps(ours, theirs), None

    # Sums stay apart by sample, so by device, until the end.
    shape = (b, 3, 9 * c, o) if shifts_x else (b, 3, c, 9 * o)
    taps, _ = lax.scan(add, jnp.zeros(shape), depth * jnp.arange(d // depth))
    taps = taps.sum(0).astype(kernel.dtype)
    if shifts_x:
        return taps.reshape(3, 3, 3, c, o)
    # Shifting the result one way is shifting the input the other way.
    return taps.reshape(3, c, 3, 3, o).transpose(0, 2, 3, 1, 4)[:, ::-1, ::-1]


def _depth_taps(ours, theirs):
    """Products [B, 3, C, O] of [B, P + 2, H, W, C] and [B, P, H, W, O]."""
    b, depth = theirs.shape[:2]
    theirs = theirs.reshape(b, -1, theirs.shape[-1])
    views = [ours[:, i : i + depth] for i in range(3)]
    taps = [_product(view.reshape(b, -1, view.shape[-1]), theirs) for view in views]
    return jnp.stack(taps, axis=1)


def _product(a, b):
    """Products [B, C, O] of [B, N, C] and [B, N, O], summed over N in float32."""
    return jnp.einsum("bnc,bno->bco", a, b, preferred_element_type=jnp.float32)


def _planes(x, start, count):
    """Planes start - 1 to start + count along depth, zeros where there are none."""
    last = x.shape[1] - 1

    def neighbour(index):
        plane = lax.dynamic_slice_in_dim(x, jnp.clip(index, 0, last), 1, axis=1)
        return jnp.where((index >= 0) & (index <= last), plane, 0)

    inside = lax.dynamic_slice_in_dim(x, start, count, axis=1)
    parts = [neighbour(start - 1), inside, neighbour(start + count)]
    return jnp.concatenate(parts, axis=1)


def _shifts(x):
    """Lay 9 shifts of each plane side by side: [B, P, H, W, C] -> [B, P, H, W, 9 C]."""
    h, w = x.shape[2:4]
    padded = jnp.pad(x, ((0, 0), (0, 0), (1, 1), (1, 1), (0, 0)))
    views = [padded[:, :, i : i + h, j : j + w] for i in range(3) for j in range(3)]
    return jnp.concatenate(views, axis=-1)
