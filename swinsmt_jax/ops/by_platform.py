"""Chooses the form of each operation for a platform; the only place that does.

The choice is made when a program is lowered, so one exported program serves several
platforms. The forms of an operation are equal up to rounding. That of cuDNN's attention
is bfloat16's, and it is chosen when a program is traced: networks that compute in
bfloat16 get it where its limits allow.
"""

import contextlib
import contextvars
import functools
from collections.abc import Callable, Iterator, Sequence
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
from swinsmt_jax.ops.cpu import convolution as convolution_on_cpu
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
# By "routing" or "windows": {how its attention is computed: of which shapes}.
Notes = dict[str, dict[str, list[str]]]
_notes: contextvars.ContextVar[Notes | None] = contextvars.ContextVar(
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
        convolve: (*parts, kernel) -> result.
        kernel_gradient: (x, kernel, cotangent) -> gradient; jax's own if not given.
    """

    def by_autodiff(x, kernel, cotangent):
        return jax.vjp(lambda k: convolve(x, k), kernel)[1](cotangent)[0]

    def backward(operands, _, cotangent):
        *parts, kernel = operands
        kernels = _split(kernel, parts, axis=-2)
        flipped = (k[::-1, ::-1, ::-1] for k in kernels)
        if kernel.ndim == 5:  # input and output channels change places
            flipped = (k.swapaxes(3, 4) for k in flipped)
        gradient = kernel_gradient or by_autodiff
        of_kernels = map(gradient, parts, kernels, [cotangent] * len(parts))
        return (
            *(convolve(cotangent, k) for k in flipped),
            jnp.concatenate([*of_kernels], axis=-2),
        )

    return Form(lambda *operands: (convolve(*operands), ()), backward)


def _by_size(small: Form, large: Form) -> Form:
    """Return the form of a convolution on a CPU: one for few voxels, and another."""

    def of(operands):
        return small if convolution_on_cpu.is_small(operands[0]) else large

    return Form(
        lambda *operands: of(operands).forward(*operands),
        lambda operands, *rest: of(operands).backward(operands, *rest),
    )


def _split(array, parts, axis):
    """Cut an array of the parts' channels, one after the other, along an axis."""
    if len(parts) == 1:
        return [array]
    return jnp.split(array, np.cumsum([p.shape[-1] for p in parts])[:-1], axis=axis)


def of_concatenation(form: Form) -> Form:
    """Return the form of (*parts, kernel), given that of (x, kernel)."""

    def joined(operands):
        *parts, kernel = operands
        return jnp.concatenate(parts, axis=-1), kernel

    def backward(operands, kept, cotangent):
        gradient, of_kernel = form.backward(joined(operands), kept, cotangent)
        return (*_split(gradient, operands[:-1], axis=-1), of_kernel)

    return Form(lambda *operands: form.forward(*joined(operands)), backward)


def _sum_of_products(*operands):
    """Multiply (*parts, kernel [C, O]) without a copy of all parts side by side."""
    *parts, kernel = operands
    return sum(map(jnp.matmul, parts, _split(kernel, parts, axis=-2)))


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


# Of arrays that stand side by side along the channels, [B, D, H, W, C1], ..., and a
# kernel of all their channels: a U-Net's decoder convolves what comes up with the skip.
conv3x3x3 = choose(
    default=of_concatenation(_convolution(convolution.conv)),
    cpu=_by_size(
        _differentiated(convolution_on_cpu.of_few_voxels),
        _convolution(convolution_on_cpu.convolve, convolution_on_cpu.kernel_gradient),
    ),
)
pointwise_conv = choose(
    default=of_concatenation(_differentiated(jnp.matmul)),
    cpu=_differentiated(_sum_of_products),
)
flat_conv = choose(  # of kernels with sides of 1 and of 3
    default=_convolution(convolution.conv),
    cpu=_convolution(convolution_on_cpu.at_once),
)
# Transposed, with a stride equal to the kernel: see `convolution.unpatchify`.
_at_once = _differentiated(convolution.unpatchify)
_few_planes = _differentiated(convolution_on_cpu.unpatchify)
up_conv = choose(default=_at_once, cpu=Form(_few_planes.forward, _at_once.backward))
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
    def form(convolve):
        return _differentiated(functools.partial(convolve, strides=strides))

    cpu = strided_conv_on_cpu
    forward = form(cpu.plane_by_plane).forward
    backward = form(cpu.at_once).backward
    return choose(default=form(convolution.conv), cpu=Form(forward, backward))


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
    where its limits allow. Elsewhere the logits are float32, on accelerators that
    multiply bfloat16 of three products of it, which err by some 3e-4.

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
    by_parts = rounded and cudnn_attention.this_device().multiplies_bfloat16
    in_blocks = _attend_by_parts if by_parts else _attend
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
    if reason is not None:
        note(what, f"in blocks, since {reason}", operands[0].shape[1:])
        return in_blocks(*operands)
    note(what, implementation, operands[0].shape[1:])
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


def note(what: str, how: str, shape: Sequence[int]) -> None:
    """Note how attention of queries of a shape is computed; see `noting`."""
    notes = _notes.get()
    if notes is not None:
        shapes = notes.setdefault(what, {}).setdefault(how, [])
        text = " x ".join(map(str, shape))
        shapes += [text] * (text not in shapes)


def described(notes: Notes) -> str:
    """Return the notes in one line, without the shapes."""
    found = [f"{what} {how}" for what, ways in notes.items() for how in ways]
    return "; ".join(found) or "none"


@contextlib.contextmanager
def noting() -> Iterator[Notes]:
    """Yield what fills with notes while programs are traced."""
    notes: Notes = {}
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
    """Leave every choice to the platform, for programs that leave this host.

    Attention that this host would give to cuDNN goes there on CUDA alone.
    """
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


def is_dense(weights: int, platform: str) -> bool:
    """Return whether a Soft MoE with so many routing weights a sample is dense."""
    return weights <= DENSE["cpu" if platform == "cpu" else "default"]


def dense_or_streaming(
    weights: int, *, dense: Callable[[], jax.Array], streaming: Callable[[], jax.Array]
) -> jax.Array:
    """Call what is faster for a Soft MoE with so many routing weights a sample.

    It is chosen for this host, so that a gradient keeps what one of them needs, or see
    `for_every_platform`.
    """

    def noted():
        note("routing", "dense", [weights])
        return dense()

    forms = {name: noted if is_dense(weights, name) else streaming for name in DENSE}
    if _for_every_platform.get() and forms["cpu"] is not forms["default"]:
        return lax.platform_dependent(**forms)
    return forms["cpu" if jax.default_backend() == "cpu" else "default"]()
