import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from swinsmt_jax.ops import blockwise_attention, by_platform, soft_routing


@settings(deadline=None, max_examples=8)
@given(tokens=st.integers(1, 20), experts=st.integers(1, 6))
def test_slot_means_average_consecutive_tokens(tokens, experts):
    x = np.random.default_rng(tokens).standard_normal((2, tokens, 3)).astype("f4")
    means = soft_routing.slot_means(jnp.asarray(x), experts)
    assert means.shape == (2, -(-tokens // experts), 3)
    for s in range(means.shape[1]):
        group = x[:, s * experts : (s + 1) * experts]
        np.testing.assert_allclose(means[:, s], group.mean(1), atol=1e-6)


def test_dispatch_sums_to_one_over_tokens_and_combine_over_slots(rng):
    logits = jnp.asarray(50 * rng.standard_normal((2, 7, 3, 4)), jnp.float32)
    dispatch = soft_routing.dispatch_weights(logits)
    combine = soft_routing.combine_weights(logits)
    np.testing.assert_allclose(dispatch.sum(1), 1, atol=1e-5)
    np.testing.assert_allclose(combine.sum((2, 3)), 1, atol=1e-5)


def test_equal_logits_average_all_tokens_and_all_experts(rng):
    x = jnp.asarray(rng.standard_normal((1, 6, 5)), jnp.float32)
    weights = jnp.zeros((1, 6, 2, 3))
    slots = soft_routing.dispatch(soft_routing.dispatch_weights(weights), x)
    np.testing.assert_allclose(slots[0, 1, 2], x[0].mean(0), atol=1e-6)
    back = soft_routing.combine(soft_routing.combine_weights(weights), slots)
    np.testing.assert_allclose(back[0, 4], x[0].mean(0), atol=1e-6)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_routing_follows_a_naive_loop_under_strict_promotion(rng, dtype):
    x = jnp.asarray(rng.standard_normal((2, 5, 4)), dtype)
    slots = jnp.asarray(rng.standard_normal((2, 3, 2, 4)), dtype)
    with jax.numpy_dtype_promotion("strict"):
        logits = soft_routing.logits(x, slots)
    assert logits.dtype == jnp.float32
    x, slots = np.asarray(x, "f4"), np.asarray(slots, "f4")
    for b, n, e, s in np.ndindex(2, 5, 3, 2):
        np.testing.assert_allclose(logits[b, n, e, s], x[b, n] @ slots[b, e, s], 1e-5)


def test_streaming_equals_dense(rng, monkeypatch):
    blocks = {"cpu": (4, 8), "default": (4, 8)}
    attend = by_platform.blocked(blockwise_attention, blocks)
    monkeypatch.setattr(by_platform, "attend", lambda *a, fused: attend(*a))
    x = jnp.asarray(rng.standard_normal((2, 11, 6)), jnp.float32)
    slots = jnp.asarray(rng.standard_normal((2, 3, 4, 6)), jnp.float32)
    logits = soft_routing.logits(x, slots)
    dispatch = soft_routing.dispatch_weights(logits)
    combine = soft_routing.combine_weights(logits)
    dispatched = soft_routing.dispatch_streaming(x, slots, x)
    expected = soft_routing.dispatch(dispatch, x)
    np.testing.assert_allclose(dispatched, expected, atol=1e-5)
    combined = soft_routing.combine_streaming(x, slots, expected)
    np.testing.assert_allclose(
        combined, soft_routing.combine(combine, expected), atol=1e-5
    )


def test_statistics_are_those_of_the_dense_weights(rng):
    x, slots = drawn(rng, (2, 11, 6), (2, 3, 4, 6))
    logits = soft_routing.logits(x, slots)
    dispatch = soft_routing.dispatch_weights(logits)
    combine = soft_routing.combine_weights(logits)
    found = soft_routing.statistics(x, slots)
    expected = {
        "dispatch_entropy": jax.scipy.special.entr(dispatch).sum(1),
        "dispatch_max": dispatch.max(1),
        "combine_entropy": jax.scipy.special.entr(combine).sum((2, 3)),
        "combine_max": combine.max((2, 3)),
        "expert_share": combine.sum(3),
    }
    for name, values in expected.items():
        np.testing.assert_allclose(
            getattr(found, name), values, atol=1e-5, err_msg=name
        )
    share = combine.sum(3)
    np.testing.assert_allclose(found.importance(), share.mean(1), atol=1e-6)
    load = (share == share.max(-1, keepdims=True)).mean(1)
    np.testing.assert_allclose(found.load(), load, atol=1e-6)


def drawn(rng, *shapes, size=1.0):
    return [jnp.asarray(size * rng.standard_normal(s), jnp.float32) for s in shapes]


def test_no_gradient_flows_through_statistics(rng):
    x, slots = drawn(rng, (1, 7, 4), (1, 2, 3, 4))

    def total(x, slots):
        return sum(a.sum() for a in soft_routing.statistics(x, slots))

    gradients = jax.grad(total, (0, 1))(x, slots)
    assert not any(g.any() for g in gradients)


def test_entropies_of_large_logits_are_not_negative(rng):
    x, slots = drawn(rng, (1, 64, 8), (1, 4, 16, 8), size=300.0)
    found = soft_routing.statistics(x, slots)
    assert float(found.dispatch_entropy.min()) >= 0
    assert float(found.combine_entropy.min()) >= 0
