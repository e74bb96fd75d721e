"""Chooses the form of each operation for a platform; the only place that does.

The choice is made when a program is lowered, so one exported program serves several
platforms. The forms of an operation are equal up to rounding. That of cuDNN's attention
is bfloat16's, and it is chosen when a program is traced: networks that compute in
bfloat16 get it where its limits allow.
"""

import contextlib
import contextvars
import functools
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from swinsmt_jax.ops import (
    blockwise_attention,
    convolution,
    fft_convolution,
    window_attention,
)
from swinsmt_jax.ops.cpu import conv3x3x3 as conv3x3x3_on_cpu
from swinsmt_jax.ops.cpu import depthwise_conv as depthwise_conv_on_cpu
from swinsmt_jax.ops.cpu import strided_conv as strided_conv_on_cpu
from swinsmt_jax.ops.gpu import cudnn_attention
from swinsmt_jax.ops.gpu.cudnn_attention import Implementation
from swinsmt_jax.ops.manual_axes import vary_alike
from swinsmt_jax.ops.tracing import traced_once

# Queries and keys of a block of attention. A CPU wants it in its cache, an accelerator
# wants few and large matrix products; benchmarks/soft_moe.py measures.
ATTENTION_BLOCK = {"cpu": (512, 1024), "default": (4096, 4096)}
# Entries of the attention matrices of one sample's windows that are made at a time: on
# a CPU 4 MB of float32, which stay in its cache; on an accelerator 256 MB, of which
# forward and backward hold a few. All windows of a 128^3 patch would be 1.4 GB each.
WINDOWS_BLOCK = {"cpu": 2**20, "default": 2**26}
# Routing weights of a sample up to which a Soft MoE is dense. On a CPU those of 1,448
# tokens with dynamic slots, from where on streaming is faster (benchmarks/soft_moe.py);
# on an accelerator those of 4,096 tokens, a 64^3 patch: not measured.
DENSE = {"cpu": 2**21, "default": 2**24}
# Entries of an array of which a program holds a few at a time, in place of one that is
# larger: a CPU wants them in its cache, an accelerator fewer kernels. Where it has N
# bytes, N / 2,048 entries of float32 take a 512th of its memory.
ENTRIES_ON_CPU, BYTES_PER_ENTRY = 2**23, 2048
# Largest depthwise kernel that is not convolved by Fourier transforms. On a CPU a
# channel of 24^3 voxels takes 24 ms by 21^3 shifted sums and 2 ms by transforms; on an
# accelerator it is not measured.
SHIFTED_KERNEL = 7


_for_every_platform = contextvars.ContextVar("for_every_platform", default=False)
_fused: contextvars.ContextVar[Implementation | None] = contextvars.ContextVar(
    "fused", default="cudnn"
)
_notes: contextvars.ContextVar[dict[str, str] | None] = contextvars.ContextVar(
    "notes", default=None
)


class Form(NamedTuple):
    """One way to compute an operation and its gradients.

    Attributes:
        forward: operands -> (result, what backward needs besides the operands).
        backward: (operands, that, cotangent) -> gradients of the operands.
    """

    forward: Callable[..., tuple[Any, Any]]
    backward: Callable[[tuple, Any, Any], tuple]


def choose(*, default: Form, cpu: Form) -> Callable:
    """Return a differentiable operation that has its own form on each platform.

    A network calls it many times on operands of one shape: it is traced once.
    """

    @traced_once
    def forward(*operands):
        return lax.platform_dependent(
            *operands, cpu=cpu.forward, default=default.forward
        )

    @traced_once
    def backward(operands, kept, cotangent):
        return lax.platform_dependent(
            operands, kept, cotangent, cpu=cpu.backward, default=default.backward
        )

    @jax.custom_vjp
    def operation(*operands):
        return forward(*operands)[0]

    def save(*operands):
        result, kept = forward(*operands)
        return result, (operands, kept)

    operation.defvjp(save, lambda saved, cotangent: backward(*saved, cotangent))
    return operation


def _differentiated(function):
    """Return the form with the gradients that jax derives."""
    return Form(
        lambda *operands: (function(*operands), ()),
        lambda operands, _, cotangent: jax.vjp(function, *operands)[1](cotangent),
    )


def _convolution(convolve, kernel_gradient=None):
    """Return the form of a convolution of stride 1: the input's gradient is another.

    Args:
        convolve: (x, kernel) -> result.
        kernel_gradient: (x, kernel, cotangent) -> gradient; jax's own if not given.
    """

    def by_autodiff(x, kernel, cotangent):
        return jax.vjp(lambda k: convolve(x, k), kernel)[1](cotangent)[0]

    def backward(operands, _, cotangent):
        x, kernel = operands
        flipped = kernel[::-1, ::-1, ::-1]
        if kernel.ndim == 5:  # input and output channels change places
            flipped = flipped.swapaxes(3, 4)
        gradient = kernel_gradient or by_autodiff
        return convolve(cotangent, flipped), gradient(x, kernel, cotangent)

    return Form(lambda *operands: (convolve(*operands), ()), backward)


def blocked(attention: ModuleType, blocks: dict[str, Any], **default: Any) -> Callable:
    """Return an attention that is made in blocks of a size for each platform.

    Args:
        attention: module with `forward` and `backward`, which take a block first.
        blocks: of the platforms "cpu" and "default".
        default: further arguments on platforms other than "cpu".
    """
    forms = {
        platform: Form(
            functools.partial(attention.forward, block),
            functools.partial(attention.backward, block),
        )
        for platform, block in blocks.items()
    }
    forms["default"] = Form(
        *(functools.partial(f, **default) for f in forms["default"])
    )
    operation = choose(**forms)
    return lambda *operands: operation(*vary_alike(*operands))


conv3x3x3 = choose(
    default=_convolution(convolution.conv),
    cpu=_convolution(conv3x3x3_on_cpu.convolve, conv3x3x3_on_cpu.kernel_gradient),
)
flat_conv = choose(  # of kernels with sides of 1 and of 3
    default=_convolution(convolution.conv),
    cpu=_convolution(conv3x3x3_on_cpu.at_once),
)
_depthwise_conv = choose(
    default=_convolution(convolution.depthwise_conv),
    cpu=_convolution(
        depthwise_conv_on_cpu.depthwise_conv, depthwise_conv_on_cpu.kernel_gradient
    ),
)


def depthwise_conv(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """Convolve every channel of [B, D, H, W, C] with its own odd kernel [k, k, k, C].

    Stride 1, zero padded by half of the kernel.
    """
    if len(kernel) > SHIFTED_KERNEL:
        return fft_convolution.depthwise_conv(x, kernel)
    return _depthwise_conv(x, kernel)


_attend = blocked(blockwise_attention, ATTENTION_BLOCK)
_attend_by_parts = blocked(
    blockwise_attention, ATTENTION_BLOCK, precision=blockwise_attention.BY_PARTS
)
_attend_within_windows = blocked(window_attention, WINDOWS_BLOCK)


@functools.cache
def _strided_conv(strides):
    forms = convolution.conv, strided_conv_on_cpu.strided_conv
    default, cpu = (
        _differentiated(functools.partial(form, strides=strides)) for form in forms
    )
    return choose(default=default, cpu=cpu)


def strided_conv(
    x: jax.Array, kernel: jax.Array, strides: convolution.Sides
) -> jax.Array:
    """Convolve with an odd kernel and strides of 1 or 2, zero padded by half of it.

    Args:
        x: [B, D, H, W, C], even along axes of stride 2.
        kernel: [p, q, r, C, O] with odd p, q, r.
        strides: (D, H, W), each 1 or 2.

    Returns:
        [B, D / s, H / s, W / s, O].
    """
    return _strided_conv(strides)(x, kernel)


def attend_within_windows(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    bias: jax.Array | None = None,
    regions: np.ndarray | None = None,
) -> jax.Array:
    """Attention of each window's tokens to one another: see `window_attention`.

    By cuDNN's kernel, whose logits are of bfloat16, where q is bfloat16 and its limits
    allow.
    """

    def in_blocks(q, k, v, bias):
        numbers = None if regions is None else jnp.asarray(regions)
        return _attend_within_windows(q, k, v, bias, numbers)

    def by_cudnn(implementation, q, k, v, bias):
        return cudnn_attention.attend_within_windows(
            q, k, v, bias, regions, implementation=implementation
        )

    return _fused_or("windows", by_cudnn, in_blocks, q, k, v, bias)


def attend(
    queries: jax.Array, keys: jax.Array, values: jax.Array, *, fused: bool = False
) -> jax.Array:
    """Average values [B, K, V] with weights softmax over keys of (queries . keys).

    Memory grows with Q + K, forward and backward: see `blockwise_attention`. With
    `fused` and values of bfloat16, cuDNN's kernel with logits of bfloat16 is taken
    where its limits allow. Elsewhere the logits are float32, on accelerators of three
    products of bfloat16, which err by some 3e-4.

    Args:
        queries: [B, Q, C].
        keys: [B, K, C].
        values: [B, K, V].
        fused: see above.

    Returns:
        [B, Q, V] in the values' dtype.
    """
    if not fused:
        return _attend(queries, keys, values)

    def by_cudnn(implementation, *operands):
        return cudnn_attention.attend(*operands, implementation=implementation)

    rounded = values.dtype == jnp.bfloat16
    in_blocks = _attend_by_parts if rounded else _attend
    return _fused_or("routing", by_cudnn, in_blocks, queries, keys, values)


def _fused_or(what, by_cudnn, in_blocks, *operands):
    """Call cuDNN's form on (queries, keys, values, ...) if it can be, and note it."""
    implementation = _fused.get()
    if implementation is None:
        reason = "deterministic kernels are requested"
    else:
        known = cudnn_attention.Device("gpu", "9.0")  # has the form "xla"
        own = cudnn_attention.this_device() if implementation == "cudnn" else known
        reason = cudnn_attention.refusal(*operands[:3], device=own)
    notes = _notes.get()
    if notes is not None:
        notes[what] = implementation if reason is None else f"in blocks, since {reason}"
    if reason is not None:
        return in_blocks(*operands)
    by_cudnn = functools.partial(by_cudnn, implementation)
    if _for_every_platform.get():
        return lax.platform_dependent(*operands, cuda=by_cudnn, default=in_blocks)
    return by_cudnn(*operands)


@contextlib.contextmanager
def fused_attention(implementation: Implementation | None) -> Iterator[None]:
    """Trace programs whose fused attention is another.

    None leaves it out: cuDNN's gradients add up in another order each time. "xla"
    rounds as cuDNN does on any platform, in the memory of the whole matrix, to measure
    what the rounding does.
    """
    token = _fused.set(implementation)
    try:
        yield
    finally:
        _fused.reset(token)


@contextlib.contextmanager
def noting() -> Iterator[dict[str, str]]:
    """Yield what fills with {"routing" or "windows": how its attention is computed}."""
    notes: dict[str, str] = {}
    token = _notes.set(notes)
    try:
        yield notes
    finally:
        _notes.reset(token)


def attend_with_softmax(
    queries: jax.Array, keys: jax.Array, values: jax.Array
) -> tuple[jax.Array, blockwise_attention.Softmax]:
    """Return `attend`'s averages, in float32, and the softmax; not differentiable."""
    forms = {
        name: functools.partial(blockwise_attention.average, block)
        for name, block in ATTENTION_BLOCK.items()
    }
    found = lax.platform_dependent(*vary_alike(queries, keys, values), **forms)
    return lax.stop_gradient(found)


@contextlib.contextmanager
def for_every_platform() -> Iterator[None]:
    """Leave `dense_or_streaming` to the platform, for programs that leave this host."""
    token = _for_every_platform.set(True)
    try:
        yield
    finally:
        _for_every_platform.reset(token)


def entries_at_a_time() -> int:
    """Return of how many entries this host's programs make large arrays at a time."""
    if jax.default_backend() == "cpu":
        return ENTRIES_ON_CPU
    stats = jax.local_devices()[0].memory_stats() or {}
    return max(ENTRIES_ON_CPU, stats.get("bytes_limit", 0) // BYTES_PER_ENTRY)


def dense_or_streaming(
    weights: int, *, dense: Callable[[], jax.Array], streaming: Callable[[], jax.Array]
) -> jax.Array:
    """Call what is faster for a Soft MoE with so many routing weights a sample.

    It is chosen for this host, so that a gradient keeps what one of them needs, or see
    `for_every_platform`.
    """
    forms = {n: dense if weights <= most else streaming for n, most in DENSE.items()}
    if _for_every_platform.get() and forms["cpu"] is not forms["default"]:
        return lax.platform_dependent(**forms)
    return forms["cpu" if jax.default_backend() == "cpu" else "default"]()
