"""3 x 3 x 3 and transposed convolutions on a CPU.

They are made of 2-D convolutions and matrix products. XLA's 3-D convolution is several
times slower there, and the gradient in its kernel more than ten times.
benchmarks/NOTES.md has the figures.
"""

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from swinsmt_jax.ops import convolution
from swinsmt_jax.ops.manual_axes import vary_alike

# Voxels of a plane from which one plane at a time beats all at once: below, the loop
# costs more than the memory traffic that it saves.
LARGE_PLANE = 32 * 32
FEW_VOXELS = 4 * 4 * 4  # of a volume that is smaller than its kernel
STRIP = 6  # rows of a plane that become those of a strip, at most
ROWS = 4096  # of the products that make the gradient in the kernel; fit into a cache


def convolve(*operands: jax.Array) -> jax.Array:
    """Convolve [B, D, H, W, C] with [3, 3, 3, C, O], stride 1, zero padding 1.

    Several arrays before the kernel stand side by side along the channels.
    """
    *parts, kernel = operands
    if math.prod(parts[0].shape[2:4]) >= LARGE_PLANE:
        return _plane_by_plane(parts, kernel)
    return at_once(jnp.concatenate(parts, axis=-1), kernel)


def is_small(x: jax.Array) -> bool:
    """Return whether a volume [B, D, H, W, C] is for `of_few_voxels`."""
    return math.prod(x.shape[1:4]) <= FEW_VOXELS


def of_few_voxels(*operands: jax.Array) -> jax.Array:
    """Convolve as `convolve` does: a product of each voxel's neighbours side by side.

    The kernel is read once as it lies, forward and backward, and without the taps that
    see nothing but padding. Any other form turns it round first, and at the coarsest
    grid of a U-Net it is far larger than the volume.
    """
    *parts, kernel = operands
    x = jnp.concatenate(parts, axis=-1)
    sides = x.shape[1:4]
    kernel = kernel[tuple(slice(1, 2) if n == 1 else slice(None) for n in sides)]
    taps = kernel.shape[:3]
    padded = jnp.pad(x, ((0, 0), *((n // 2, n // 2) for n in taps), (0, 0)))
    views = [
        padded[:, i : i + sides[0], j : j + sides[1], k : k + sides[2]]
        for i, j, k in np.ndindex(*taps)
    ]
    neighbours = jnp.concatenate(views, axis=-1)
    return neighbours @ kernel.reshape(-1, kernel.shape[-1])


def at_once(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """Convolve with [p, q, r, C, O], sides 1 or 3, stride 1, zero padded by half.

    One 2-D convolution to p O channels, depth as batch; then shift and add.
    """
    b, d, h, w, c = x.shape
    p, q, r, _, out = kernel.shape
    planes = jnp.transpose(kernel, (1, 2, 3, 0, 4)).reshape(q, r, c, p * out)
    y = conv_2d(x.reshape(b * d, h, w, c), planes).reshape(b, d, h, w, p, out)
    if p == 1:
        return y[..., 0, :]
    before, centre, after = y[..., 0, :], y[..., 1, :], y[..., 2, :]
    zero = jnp.zeros_like(centre[:, :1])
    return (
        centre
        + jnp.concatenate([zero, before[:, :-1]], axis=1)
        + jnp.concatenate([after[:, 1:], zero], axis=1)
    )


def _plane_by_plane(parts, kernel):
    """For each plane, a 2-D convolution of it and its neighbours, 3 C channels.

    A strip holds plane i in the channels of i % 3. So each plane is laid into it once,
    and the kernel's taps turn.
    """
    (b, d, h, w, _), channels = parts[0].shape, kernel.shape[3]
    bands = _bands(h)
    turned = [jnp.roll(kernel, turn - 1, axis=0) for turn in range(3)]
    taps = jnp.stack([jnp.concatenate([*t], axis=2) for t in turned])

    def lay(strip, parts, index):
        channel = index % 3 * channels
        for part in parts:
            plane = lax.dynamic_slice_in_dim(part, jnp.minimum(index, d - 1), 1, axis=1)
            plane = jnp.where(index < d, plane, 0)
            plane = plane.reshape(b, bands, h // bands, w, -1).swapaxes(1, 2)
            above = jnp.pad(plane[:, -1:, :-1], _one_more(axis=2, after=False))
            below = jnp.pad(plane[:, :1, 1:], _one_more(axis=2, after=True))
            plane = jnp.concatenate([above, plane, below], axis=1)
            strip = lax.dynamic_update_slice(strip, plane, (0, 0, 0, 1, channel))
            channel += part.shape[-1]
        return strip

    def convolve_plane(index, state):
        y, strip = state
        now = [y, *parts[1:]] if in_place else parts
        strip = lay(strip, now, index + 1)
        one = _conv_strip(strip, taps[index % 3])[:, None]
        return lax.dynamic_update_slice_in_dim(y, one, index, axis=1), strip

    # The strip holds what is needed of a plane once its result is written, so results
    # take the place of a part that is as wide. Otherwise they begin as a part's voxels:
    # XLA makes constants at the start of the program, where they take memory until they
    # are used.
    shape = (b, d, h, w, kernel.shape[-1])
    in_place = parts[0].shape == shape
    y = parts[0] if in_place else jnp.broadcast_to(parts[0][:, :1, :1, :1, :1], shape)
    strip = jnp.zeros((b, h // bands + 2, bands, w + 2, 3 * channels), y.dtype)
    strip = lay(vary_alike(strip, y)[0], parts, 0)
    return lax.fori_loop(0, d, convolve_plane, (y, strip))[0]


def _one_more(*, axis, after):
    """Return the padding of [N, rows, bands, W, C] by one along an axis."""
    widths = [(0, 0)] * 5
    widths[axis] = (0, 1) if after else (1, 0)
    return widths


def unpatchify(
    x: jax.Array, kernel: jax.Array, bias: jax.Array | None = None
) -> jax.Array:
    """Compute `convolution.unpatchify`, large planes one after the other.

    As one product, XLA copies the input and the result into other orders of their axes.
    """
    b, d, h, w, c = x.shape
    p, q, r, _, out = kernel.shape
    if h * q * w * r < LARGE_PLANE:
        return convolution.unpatchify(x, kernel, bias)
    flat = jnp.einsum("pqrco->cpqro", kernel).reshape(c, -1)

    def planes(index, y):
        one = lax.dynamic_index_in_dim(x, index, axis=1, keepdims=False) @ flat
        few = jnp.einsum("bhwpqro->bphqwro", one.reshape(b, h, w, p, q, r, out))
        few = few.reshape(b, p, h * q, w * r, out)
        few = few if bias is None else convolution.add_bias(few, bias)
        return lax.dynamic_update_slice_in_dim(y, few, p * index, axis=1)

    # Made of `x`, and not a constant: see above.
    shape = (b, d * p, h * q, w * r, out)
    return lax.fori_loop(0, d, planes, jnp.broadcast_to(x[:, :1, :1, :1, :1], shape))


def conv_in_strips(
    x: jax.Array, kernel: jax.Array, padding: Sequence[tuple[int, int]]
) -> jax.Array:
    """Convolve planes [N, H, W, C] with [q, r, C, O], stride 1, to [N, H, W, O].

    XLA divides a convolution among threads along its last axis alone, and a plane has
    too few columns for that. So bands of its rows, with the rows around them, stand
    side by side in a strip.
    """
    x = jnp.pad(x, ((0, 0), *padding, (0, 0)))
    further = kernel.shape[0] - 1
    height = x.shape[1] - further
    rows = height // _bands(height)
    bands = [x[:, i : i + rows + further] for i in range(0, height, rows)]
    return _conv_strip(jnp.stack(bands, axis=2), kernel)


def _bands(height):
    """Return into how many bands a plane is divided: of 1 to STRIP rows, all alike."""
    return height // max(rows for rows in range(1, STRIP + 1) if height % rows == 0)


def _conv_strip(strip, kernel):
    """Convolve bands [N, rows, bands, columns, C], and put them below each other."""
    n, _, bands, columns, c = strip.shape
    further = kernel.shape[1] - 1
    wide = strip.reshape(n, -1, bands * columns, c)
    y = conv_2d(wide, kernel, ((0, 0), (0, further)))
    y = y.reshape(n, -1, bands, columns, kernel.shape[-1])[:, :, :, : columns - further]
    return y.swapaxes(1, 2).reshape(n, -1, columns - further, kernel.shape[-1])


def conv_2d(
    x: jax.Array, kernel: jax.Array, padding: str | Sequence = "SAME"
) -> jax.Array:
    """Convolve planes [N, H, W, C] with [q, r, C, O], stride 1."""
    return lax.conv_general_dilated(
        x, kernel, (1, 1), padding, dimension_numbers=("NHWC", "HWIO", "NHWC")
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
