import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from swinsmt_jax.ops import by_platform, windows
from swinsmt_jax.ops.gpu import cudnn_attention

BFLOAT16 = jnp.bfloat16


def operands(rng, *, channels=16, dtype="bfloat16"):
    q, k, v = (
        jnp.asarray(rng.standard_normal((2, n, channels)), jnp.float32)
        for n in (10, 14, 14)
    )
    return q / 2, k / 2, v.astype(dtype)


def distance(ours, theirs):
    """Relative L2 distance of two arrays."""
    ours, theirs = (np.asarray(a, np.float32) for a in (ours, theirs))
    return np.linalg.norm(ours - theirs) / np.linalg.norm(theirs)


def with_gradients(function, cotangent, *operands):
    """Return a function's result and the gradients of all its operands."""

    @jax.jit
    def both(*operands):
        out, pullback = jax.vjp(function, *operands)
        return out, *pullback(cotangent)

    return both(*operands)


def test_elsewhere_it_streams_and_says_why(rng):
    q, k, v = operands(rng)
    with by_platform.noting() as notes:
        out = by_platform.attend(q, k, v, fused=True)
    how = "in blocks, since the platform is cpu, not gpu"
    assert notes == {"routing": {how: ["10 x 16"]}}
    assert by_platform.described(notes) == f"routing {how}"
    np.testing.assert_array_equal(out, by_platform.attend(q, k, v))


def test_deterministic_kernels_are_never_fused(rng):
    q, k, v = operands(rng)
    with by_platform.fused_attention(None), by_platform.noting() as notes:
        out = by_platform.attend(q, k, v, fused=True)
    assert "deterministic" in by_platform.described(notes)
    np.testing.assert_array_equal(out, by_platform.attend(q, k, v))


def test_its_arithmetic_differs_by_the_rounding_of_bfloat16(rng):
    q, k, v = operands(rng)

    cotangent = jnp.asarray(rng.standard_normal(q.shape), v.dtype)

    def both():
        attend = functools.partial(by_platform.attend, fused=True)
        return with_gradients(attend, cotangent, q, k, v)

    expected = both()
    with by_platform.fused_attention("xla"), by_platform.noting() as notes:
        found = both()
    assert notes == {"routing": {"xla": ["10 x 16"]}}
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.dtype == theirs.dtype and 0 < distance(ours, theirs) < 0.02


GRIDS = {  # grid, window and shift, each with its patterns of regions
    "not shifted": ((4, 4, 4), (2, 2, 2), (0, 0, 0)),
    "shifted": ((6, 6, 6), (3, 3, 3), (1, 1, 1)),
    "one axis": ((6, 3, 6), (3, 3, 3), (1, 0, 0)),
}


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("grid", GRIDS)
def test_windows_by_patterns_are_those_in_blocks(rng, grid, batch):
    """Values and all gradients, for odd windows too (27 tokens)."""
    sides, window, shift = GRIDS[grid]
    regions = windows.shift_regions(sides, window, shift) if any(shift) else None
    count, tokens, heads = math.prod(sides) // math.prod(window), math.prod(window), 3
    shape = (batch, count, tokens, heads, 8)
    q, k, v, cotangent = (jnp.asarray(rng.normal(size=shape), BFLOAT16) for _ in "qkvg")
    bias = jnp.asarray(rng.normal(size=(heads, tokens, tokens)), jnp.float32)

    def both():
        @jax.checkpoint  # as networks do it
        def attend(q, k, v, bias):
            return by_platform.attend_within_windows(q, k, v, bias, regions)

        return with_gradients(attend, cotangent, q, k, v, bias)

    expected = both()
    with by_platform.fused_attention("xla"), by_platform.noting() as notes:
        found = both()
    assert list(notes["windows"]) == ["xla"]
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.dtype == theirs.dtype and 0 < distance(ours, theirs) < 0.02


def test_windows_of_different_regions_see_nothing_of_one_another(rng):
    regions = windows.shift_regions((6, 6, 6), (3, 3, 3), (1, 1, 1))
    q, k = (jnp.asarray(rng.normal(size=(1, 8, 27, 1, 8)), BFLOAT16) for _ in "qk")
    numbers = jnp.asarray(regions[None, :, :, None, None], BFLOAT16)
    v = jnp.broadcast_to(numbers, q.shape)
    attend = functools.partial(
        cudnn_attention.attend_within_windows, regions=regions, implementation="xla"
    )
    out = jax.jit(attend)(q, k, v)
    np.testing.assert_allclose(*np.asarray([out, v], np.float32), rtol=0.01)


def test_windows_without_a_bias(rng):
    q, k, v = (jnp.asarray(rng.normal(size=(2, 3, 5, 2, 8)), BFLOAT16) for _ in "qkv")
    exact = jax.jit(by_platform.attend_within_windows)(q, k, v)
    fused = cudnn_attention.attend_within_windows
    out = jax.jit(functools.partial(fused, implementation="xla"))(q, k, v)
    assert distance(out, exact) < 0.02


@pytest.mark.parametrize(
    "options, capability, words",
    [
        ({"dtype": "float32"}, "8.0", "values are float32"),
        ({"channels": 12}, "8.0", "12 channels"),
        ({"channels": 136}, "8.6", "not a multiple of 8 up to 128"),
        ({"channels": 136}, "10.0", "136 channels"),
        ({"channels": 264}, "9.0", "not a multiple of 8 up to 256"),
        ({}, "7.5", "compute capability is 7.5, and it needs 8.0"),
        ({}, "gfx90a", "capability is gfx90a"),
        ({}, None, "capability is None"),
        ({}, "8.0", None),
        ({"channels": 192}, "9.0", None),
        ({}, "12.0", None),
    ],
)
def test_knows_the_limits_of_cudnn(rng, options, capability, words):
    device = cudnn_attention.Device("gpu", capability)
    found = cudnn_attention.refusal(*operands(rng, **options), device=device)
    assert found is None if words is None else words in found


# Swin SMT of the paper at 128^3: tokens and channels of the Soft MoE of each stage,
# windows and heads of 16 channels of each stage.
@pytest.mark.parametrize(
    "tokens, channels, capability, form",
    [
        (32**3, 96, "8.0", "cudnn"),
        (32**3, 96, "7.5", "in blocks"),
        (16**3, 192, "8.0", "dense"),
        (16**3, 192, "9.0", "dense"),
        (8**3, 384, "9.0", "dense"),
    ],
)
def test_the_papers_routing(tokens, channels, capability, form):
    shape = (1, tokens, channels)
    operands = [jax.ShapeDtypeStruct(shape, d) for d in (jnp.float32, BFLOAT16)]
    device = cudnn_attention.Device("gpu", capability)
    refused = cudnn_attention.refusal(*operands[:1] * 2, operands[1], device=device)
    assert by_platform.is_dense(tokens**2, "gpu") == (form == "dense")
    assert form == "dense" or (refused is None) == (form == "cudnn")


@pytest.mark.parametrize(
    "platform, capability, found",
    [
        ("gpu", "7.5", False),
        ("gpu", "8.0", True),
        ("gpu", "gfx90a", False),
        ("tpu", None, True),
    ],
)
def test_products_of_bfloat16_are_asked_of_what_has_them(platform, capability, found):
    device = cudnn_attention.Device(platform, capability)
    assert device.multiplies_bfloat16 == found


@pytest.mark.parametrize(
    "count, tokens, heads", [(1000, 343, 3), (125, 343, 6), (27, 343, 12), (8, 343, 24)]
)
def test_the_papers_windows(count, tokens, heads):
    windows = jax.ShapeDtypeStruct((1, count, tokens, heads, 16), BFLOAT16)
    for capability in ("8.0", "9.0", "10.0"):
        device = cudnn_attention.Device("gpu", capability)
        assert cudnn_attention.refusal(windows, windows, windows, device=device) is None


def test_each_way_is_noted_with_its_shapes(rng):
    """One network has routing that is dense, streams and is fused."""
    streaming = functools.partial(by_platform.attend, fused=True)
    with by_platform.fused_attention("xla"), by_platform.noting() as notes:
        for channels in (16, 16, 12):
            streaming(*operands(rng, channels=channels))
        by_platform.dense_or_streaming(64, dense=lambda: 1, streaming=lambda: 2)
    refused = "in blocks, since 12 channels are not a multiple of 8 up to 256"
    assert notes["routing"] == {
        "xla": ["10 x 16"],
        refused: ["10 x 12"],
        "dense": ["64"],
    }
    ways = "routing xla; routing in blocks, since 12 channels are not a multiple of 8 "
    assert by_platform.described(notes) == f"{ways}up to 256; routing dense"


def test_float32_networks_are_never_rounded(rng):
    q, k, v = operands(rng, dtype="float32")
    with by_platform.fused_attention("xla"), by_platform.noting() as notes:
        out = by_platform.attend(q, k, v, fused=True)
    assert "values are float32" in by_platform.described(notes)
    np.testing.assert_array_equal(out, by_platform.attend(q, k, v))


def test_an_accelerator_makes_logits_of_three_products(rng):
    """In a bfloat16 network that streams, and of float32 for `routing="streaming"`."""
    q, k, v = operands(rng)

    def program(fused, platform):
        attend = functools.partial(by_platform.attend, fused=fused)
        traced = jax.jit(attend).trace(q, k, v)
        return traced.lower(lowering_platforms=(platform,)).as_text()

    for platform in ("cuda", "tpu"):
        assert "num_primitive_operations = 3" in program(True, platform)
        assert "num_primitive_operations = 3" not in program(False, platform)
        assert "precision = [HIGHEST, HIGHEST]" in program(False, platform)
    assert "num_primitive_operations = 3" not in program(True, "cpu")


def test_sees_the_device_that_jax_computes_on():
    assert cudnn_attention.this_device() == ("cpu", None)


def test_a_gpu_runs_cudnns_kernels_forward_and_backward(rng):
    device = cudnn_attention.this_device()
    q, k, v = operands(rng)
    reason = cudnn_attention.refusal(q, k, v, device=device)
    if reason is not None:
        pytest.skip(f"cuDNN's attention cannot be lowered here: {reason}")

    def loss(q, k, v):
        return by_platform.attend(q, k, v, fused=True).astype(jnp.float32).sum()

    program = jax.jit(jax.grad(loss, (0, 1, 2))).lower(q, k, v).compile().as_text()
    assert "__cudnn$fmhaSoftmax" in program and "Backward" in program
