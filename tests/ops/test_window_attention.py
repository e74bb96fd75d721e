import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from swinsmt_jax.ops import by_platform, window_attention


def draw(rng, *shape):
    return jnp.asarray(rng.normal(size=shape), jnp.float32)


def plain(q, k, v, bias, regions):
    logits = jnp.einsum("bwihc,bwjhc->bwhij", q, k) / q.shape[-1] ** 0.5 + bias
    if regions is not None:
        apart = regions[:, None, :, None] != regions[:, None, None, :]
        logits = logits - 100.0 * apart
    return jnp.einsum("bwhij,bwjhc->bwihc", jax.nn.softmax(logits), v)


# A CPU takes 1,100 tokens in 2 heads window by window, 700 two windows at a time.
@pytest.mark.parametrize(
    ("windows", "tokens", "masked"),
    [(6, 10, True), (3, 1100, False), (2, 1100, True), (4, 700, True)],
)
def test_attend_is_softmax_attention_with_its_gradients(rng, windows, tokens, masked):
    shape = (2 if tokens < 100 else 1, windows, tokens, 2, 3)
    q, k, v, cotangent = (draw(rng, *shape) for _ in range(4))
    bias = draw(rng, 2, tokens, tokens)
    regions = None
    if masked:
        regions = jnp.asarray(rng.integers(0, 3, (windows, tokens)), jnp.int32)

    def both(attend):
        out, pullback = jax.vjp(lambda *a: attend(*a, regions), q, k, v, bias)
        return out, *pullback(cotangent)

    for ours, theirs in zip(
        both(by_platform.attend_within_windows), both(plain), strict=True
    ):
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-4)


def test_attend_keeps_no_attention_matrix(rng):
    """Of 8 windows' 34 MB of weights, forward and backward hold a block's at most."""
    q, k, v = (jnp.zeros((1, 8, 1024, 1, 2)) for _ in range(3))

    def loss(q, k, v):
        return by_platform.attend_within_windows(
            q, k, v, jnp.zeros((1, 1024, 1024))
        ).sum()

    compiled = jax.jit(jax.grad(loss, (0, 1, 2))).lower(q, k, v).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 24e6


def test_an_accelerator_takes_windows_in_blocks_too():
    """Of the 1,000 windows of a 128^3 patch, 1.4 GB a matrix, at most 256 MB."""
    tokens = jax.ShapeDtypeStruct((1, 1000, 343, 3, 16), jnp.float32)
    bias = jax.ShapeDtypeStruct((3, 343, 343), jnp.float32)

    def loss(q, k, v, bias):
        return by_platform.attend_within_windows(q, k, v, bias).sum()

    traced = jax.jit(jax.grad(loss, (0, 1, 2, 3))).trace(tokens, tokens, tokens, bias)
    for platform, most in (("cuda", 2**26), ("tpu", 2**26), ("cpu", 2**20)):
        program = traced.lower(lowering_platforms=(platform,)).as_text()
        shapes = re.findall(r"tensor<((?:\d+x)+)343x343xf32>", program)
        sizes = [math.prod(map(int, s.split("x")[:-1])) * 343**2 for s in shapes]
        assert most / 4 < max(sizes) <= most, platform


def test_runs_inside_a_users_shard_map(rng):
    """Windows are divided by sample, the bias is the same on every device."""
    blocked = by_platform.blocked(window_attention, {"cpu": 100, "default": 100})

    def attend(*operands):
        return blocked(*operands, None)

    mesh = jax.make_mesh(
        (2,),
        ("data",),
        axis_types=(jax.sharding.AxisType.Auto,),
        devices=jax.devices()[:2],
    )
    q, k, v, cotangent = (draw(rng, 2, 3, 5, 2, 3) for _ in range(4))
    bias, divided = draw(rng, 2, 5, 5), jax.P("data")
    mapped = jax.shard_map(
        attend,
        mesh=mesh,
        in_specs=(divided, divided, divided, jax.P()),
        out_specs=divided,
    )

    def run(f):
        out, pullback = jax.vjp(f, q, k, v, bias)
        return out, *pullback(cotangent)

    for ours, theirs in zip(run(jax.jit(mapped)), run(attend), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-5)
