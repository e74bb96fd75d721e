import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from swinsmt_jax.ops import blockwise_attention, by_platform


def in_blocks(block):
    blocks = {"cpu": block, "default": block}
    return by_platform.blocked(blockwise_attention, blocks)


attend = in_blocks((8, 16))


def whole(queries, keys, values):
    logits = jnp.einsum("bqc,bkc->bqk", queries, keys, precision="highest")
    return jnp.einsum("bqk,bkv->bqv", jax.nn.softmax(logits), values)


def operands(seed, *, batch, queries, keys, channels=6, width=5, size=1.0):
    rng = np.random.default_rng(seed)
    shapes = (queries, channels), (keys, channels), (keys, width), (queries, width)
    q, k, v, g = (
        jnp.asarray(rng.standard_normal((batch, *s)), jnp.float32) for s in shapes
    )
    return q * size, k * size, v, g


def assert_same(q, k, v, g, *, tolerance=1e-5):
    def value_and_gradients(f):
        out, pullback = jax.vjp(f, q, k, v)
        return out, *pullback(g)

    ours = jax.jit(lambda: value_and_gradients(attend))()
    theirs = value_and_gradients(whole)
    # Gradients of queries and keys are sums of products that cancel where the softmax
    # picks one key: rounding is measured against the products, not against the sum.
    q_size, k_size, v_size, g_size = (float(jnp.abs(a).max()) for a in (q, k, v, g))
    scales = v_size, g_size * v_size * k_size, g_size * v_size * q_size, g_size
    for a, b, scale in zip(ours, theirs, scales, strict=True):
        assert bool(jnp.isfinite(a).all())
        np.testing.assert_allclose(a / scale, b / scale, rtol=0, atol=tolerance)


@pytest.mark.parametrize("batch, queries, keys", [(1, 8, 16), (2, 19, 37), (2, 5, 40)])
def test_equals_the_whole_softmax_with_gradients(batch, queries, keys):
    assert_same(*operands(0, batch=batch, queries=queries, keys=keys))


@pytest.mark.slow
@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 1000),
    batch=st.integers(1, 3),
    queries=st.integers(1, 40),
    keys=st.integers(1, 70),
    size=st.sampled_from([0.1, 1.0, 4.0, 30.0]),
)
def test_equals_the_whole_softmax_for_any_shape(seed, batch, queries, keys, size):
    # Logits of 6 channels reach 6 * 30^2 and more: there the softmax picks one key, and
    # a rounding of its logit, some 1e-4, is a relative error of the others' weights.
    shape = {"batch": batch, "queries": queries, "keys": keys}
    tolerance = 1e-5 if size <= 4 else 2e-4
    assert_same(*operands(seed, **shape, size=size), tolerance=tolerance)


def test_extreme_logits_pick_the_largest():
    q, k, v, g = operands(1, batch=1, queries=9, keys=33, size=1e4)
    out, pullback = jax.vjp(jax.jit(attend), q, k, v)
    best = jnp.einsum("bqc,bkc->bqk", q, k).argmax(-1)
    np.testing.assert_allclose(out[0], v[0][best[0]], rtol=1e-6)
    assert all(bool(jnp.isfinite(a).all()) for a in pullback(g))


def test_bfloat16_values_stay_near_float32():
    q, k, v, g = operands(3, batch=1, queries=20, keys=40)

    def run(v):
        out, pullback = jax.vjp(attend, q, k, v)
        return out, *pullback(g.astype(v.dtype))

    for a, b in zip(run(v.astype(jnp.bfloat16)), run(v), strict=True):
        error = np.linalg.norm(np.asarray(a, np.float32) - b) / np.linalg.norm(b)
        assert error < 0.01


def test_vmap_is_the_batch():
    q, k, v, _ = operands(4, batch=3, queries=9, keys=20)
    mapped = jax.vmap(lambda q, k, v: attend(q[None], k[None], v[None])[0])(q, k, v)
    np.testing.assert_allclose(mapped, attend(q, k, v), atol=1e-6)


def test_memory_grows_linearly():
    attend = in_blocks((256, 256))

    def temporaries(n):
        a = jax.ShapeDtypeStruct((1, n, 8), jnp.float32)
        gradient = jax.grad(lambda q, k, v: attend(q, k, v).sum(), (0, 1, 2))
        compiled = jax.jit(gradient).lower(a, a, a).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    small, large = temporaries(4096), temporaries(16384)
    assert large < 5 * small and large < 16384**2


def test_runs_inside_a_users_shard_map():
    """Keys and values are divided, the queries the same on every device."""
    mesh = jax.make_mesh(
        (2, 2),
        ("data", "other"),
        axis_types=(jax.sharding.AxisType.Auto,) * 2,
        devices=jax.devices()[:4],
    )
    q, k, v, g = operands(5, batch=4, queries=9, keys=20)
    divided, whole = jax.P("data"), jax.P()

    def each(q, k, v):
        return attend(jnp.broadcast_to(q, (k.shape[0], *q.shape)), k, v)

    mapped = jax.shard_map(
        each, mesh=mesh, in_specs=(whole, divided, divided), out_specs=divided
    )

    def run(f):
        out, pullback = jax.vjp(f, q[0], k, v)
        return out, *pullback(g)

    for ours, theirs in zip(run(jax.jit(mapped)), run(each), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-5)
