"""Convolutions as pure functions: 3 x 3 x 3, strided, depthwise, kernel = stride."""

import functools

import jax
import jax.numpy as jnp
from jax import lax

from swinsmt_jax.ops import convolution_on_cpu
from swinsmt_jax.ops.tracing import traced_once

Strides = tuple[int, int, int]


@jax.custom_vjp
@traced_once
def conv3x3x3(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """Convolve with a 3 x 3 x 3 kernel, stride 1, zero padding 1.

    A CPU gets the forms of `convolution_on_cpu`, every other platform XLA's 3-D
    convolution. The choice is made when the program is lowered, so one exported program
    serves several platforms. Equal up to rounding.

    Args:
        x: [B, D, H, W, C].
        kernel: [3, 3, 3, C, O].

    Returns:
        [B, D, H, W, O] in the dtype of `x`.
    """
    return lax.platform_dependent(
        x, kernel, cpu=convolution_on_cpu.convolve, default=_direct
    )


def _forward(x, kernel):
    return conv3x3x3(x, kernel), (x, kernel)


@traced_once
def _backward(saved, cotangent):
    x, kernel = saved
    flipped = kernel[::-1, ::-1, ::-1].swapaxes(3, 4)
    dx = lax.platform_dependent(
        cotangent, flipped, cpu=convolution_on_cpu.convolve, default=_direct
    )
    dkernel = lax.platform_dependent(
        x,
        kernel,
        cotangent,
        cpu=_kernel_gradient_on_cpu,
        default=functools.partial(_kernel_gradient, _direct),
    )
    return dx, dkernel


conv3x3x3.defvjp(_forward, _backward)


def _kernel_gradient(convolve, x, kernel, cotangent):
    _, pullback = jax.vjp(lambda k: convolve(x, k), kernel)
    return pullback(cotangent)[0]


def _kernel_gradient_on_cpu(x, kernel, cotangent):
    return convolution_on_cpu.kernel_gradient(x, cotangent).astype(kernel.dtype)


def _direct(x, kernel):
    return lax.conv_general_dilated(
        x, kernel, (1, 1, 1), "SAME", dimension_numbers=("NDHWC", "DHWIO", "NDHWC")
    )


@jax.custom_vjp
@traced_once
def pointwise_conv(
    x: jax.Array, kernel: jax.Array, bias: jax.Array | None = None
) -> jax.Array:
    """Convolve with a 1 x 1 x 1 kernel.

    A CPU goes through the planes one by one, so that of arrays as large as the logits
    it makes none but the result.

    Args:
        x: [B, D, H, W, C].
        kernel: [C, O].
        bias: [O], or None.

    Returns:
        [B, D, H, W, O].
    """
    return lax.platform_dependent(
        x, kernel, bias, cpu=convolution_on_cpu.pointwise, default=_pointwise_direct
    )


def _pointwise_forward(x, kernel, bias):
    return pointwise_conv(x, kernel, bias), (x, kernel, bias)


@traced_once
def _pointwise_backward(saved, cotangent):
    x, kernel, bias = saved
    dx, dkernel, dbias = lax.platform_dependent(
        x,
        kernel,
        cotangent,
        cpu=convolution_on_cpu.pointwise_gradients,
        default=_pointwise_gradients_direct,
    )
    dbias = None if bias is None else dbias.astype(bias.dtype)
    return dx, dkernel.astype(kernel.dtype), dbias


pointwise_conv.defvjp(_pointwise_forward, _pointwise_backward)


def _pointwise_direct(x, kernel, bias):
    y = x @ kernel
    return y if bias is None else y + bias


def _pointwise_gradients_direct(x, kernel, cotangent):
    sums = {"preferred_element_type": jnp.float32}
    dkernel = jnp.einsum("bxyzc,bxyzo->co", x, cotangent, **sums)
    dbias = cotangent.sum((0, 1, 2, 3), dtype=jnp.float32)
    return cotangent @ kernel.T, dkernel, dbias


def strided_conv(x: jax.Array, kernel: jax.Array, strides: Strides) -> jax.Array:
    """Convolve with an odd kernel and strides of 1 or 2, zero padded by half of it.

    XLA's gradient of a strided convolution is slow on CPU, so there every axis of
    stride 2 is folded into the channels and what remains is written over 2-D
    convolutions of stride 1. Every other platform gets the 3-D convolution.

    Args:
        x: [B, D, H, W, C], even along axes of stride 2.
        kernel: [p, q, r, C, O] with odd p, q, r.
        strides: (D, H, W), each 1 or 2.

    Returns:
        [B, D / s, H / s, W / s, O].
    """
    return _strided(strides, x, kernel)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
@functools.partial(traced_once, static_argnums=0)
def _strided(strides, x, kernel):
    return lax.platform_dependent(
        x,
        kernel,
        cpu=functools.partial(_strided_over_2d, strides),
        default=functools.partial(_strided_direct, strides),
    )


def _strided_forward(strides, x, kernel):
    return _strided(strides, x, kernel), (x, kernel)


@functools.partial(traced_once, static_argnums=0)
def _strided_backward(strides, saved, cotangent):
    def pullback(convolve, x, kernel, cotangent):
        return jax.vjp(functools.partial(convolve, strides), x, kernel)[1](cotangent)

    return lax.platform_dependent(
        *saved,
        cotangent,
        cpu=functools.partial(pullback, _strided_over_2d),
        default=functools.partial(pullback, _strided_direct),
    )


_strided.defvjp(_strided_forward, _strided_backward)


def _strided_direct(strides, x, kernel):
    half = [(n // 2, n // 2) for n in kernel.shape[:3]]
    return lax.conv_general_dilated(
        x, kernel, strides, half, dimension_numbers=("NDHWC", "DHWIO", "NDHWC")
    )


def _strided_over_2d(strides, x, kernel):
    x = _fold(x, strides)
    kernel, padding = _fold_kernel(kernel, strides)
    b, d, h, w, c = x.shape
    x = jnp.pad(x, ((0, 0), padding[0], (0, 0), (0, 0), (0, 0)))
    y = sum(
        lax.conv_general_dilated(
            x[:, i : i + d].reshape(b * d, h, w, c),
            taps,
            (1, 1),
            padding[1:],
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )
        for i, taps in enumerate(kernel)
    )
    return y.reshape(b, d, h, w, -1)


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


@jax.custom_vjp
@traced_once
def depthwise_conv(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """Convolve every channel with its own odd cubic kernel, stride 1, zero padded.

    XLA's grouped 3-D convolution takes seconds on CPU, so there the kernel's taps are
    multiplied with shifted views and added; its gradient is a matrix product per line
    of taps. Every other platform gets the grouped convolution. The sums are float32.

    Args:
        x: [B, D, H, W, C].
        kernel: [k, k, k, C].

    Returns:
        [B, D, H, W, C] in the dtype of `x`.
    """
    return lax.platform_dependent(
        x, kernel, cpu=_shift_and_add, default=_depthwise_direct
    )


def _depthwise_forward(x, kernel):
    return depthwise_conv(x, kernel), (x, kernel)


@traced_once
def _depthwise_backward(saved, cotangent):
    x, kernel = saved
    dx = depthwise_conv(cotangent, kernel[::-1, ::-1, ::-1])
    dkernel = lax.platform_dependent(
        x,
        kernel,
        cotangent,
        cpu=_depthwise_kernel_gradient,
        default=functools.partial(_kernel_gradient, _depthwise_direct),
    )
    return dx, dkernel


depthwise_conv.defvjp(_depthwise_forward, _depthwise_backward)


def _depthwise_direct(x, kernel):
    return lax.conv_general_dilated(
        x,
        kernel[:, :, :, None],
        (1, 1, 1),
        "SAME",
        dimension_numbers=("NDHWC", "DHWIO", "NDHWC"),
        feature_group_count=x.shape[-1],
    )


def _shift_and_add(x, kernel):
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


def _depthwise_kernel_gradient(x, kernel, cotangent):
    """Per line of taps, the products of all columns; the taps are its diagonals."""
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
