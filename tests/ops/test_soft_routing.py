import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from swinsmt_jax.ops import soft_routing


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


def masks(rng, *, tokens, experts):
    mask = np.ones((2, tokens), bool)
    mask[1, 3:] = False
    mask = jnp.asarray(mask)
    return mask, soft_routing.slot_mask(mask, experts)


@pytest.mark.parametrize("masked", [False, True])
def test_streaming_equals_dense(rng, masked, monkeypatch):
    monkeypatch.setattr(soft_routing.blockwise_attention, "CPU_BLOCK", (4, 8))
    x = jnp.asarray(rng.standard_normal((2, 11, 6)), jnp.float32)
    slots = jnp.asarray(rng.standard_normal((2, 3, 4, 6)), jnp.float32)
    tokens, filled = masks(rng, tokens=11, experts=3) if masked else (None, None)
    logits = soft_routing.logits(x, slots)
    weights = soft_routing.RoutingWeights(
        soft_routing.dispatch_weights(logits, token_mask=tokens),
        soft_routing.combine_weights(logits, slot_mask=filled),
    )
    dispatched = soft_routing.dispatch_streaming(x, slots, x, token_mask=tokens)
    expected = soft_routing.dispatch(weights.dispatch, x)
    np.testing.assert_allclose(dispatched, expected, atol=1e-5)
    combined = soft_routing.combine_streaming(x, slots, expected, slot_mask=filled)
    np.testing.assert_allclose(
        combined, soft_routing.combine(weights.combine, expected), atol=1e-5
    )
    ours = soft_routing.statistics(x, slots, token_mask=tokens, slot_mask=filled)
    theirs = soft_routing.statistics_of(weights, token_mask=tokens)
    for name, a, b in zip(ours._fields, ours, theirs, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5, err_msg=name)
    np.testing.assert_allclose(ours.importance().sum(-1), 1, atol=1e-6)
    np.testing.assert_allclose(ours.importance(), theirs.importance(), atol=1e-6)
    np.testing.assert_allclose(ours.load(), theirs.load(), atol=1e-6)


def test_masked_slot_means_leave_tokens_out(rng):
    x = jnp.asarray(rng.standard_normal((1, 5, 2)), jnp.float32)
    mask = jnp.asarray([[True, False, True, False, False]])
    means = soft_routing.slot_means(x, 3, mask=mask)
    np.testing.assert_allclose(means[0, 0], (x[0, 0] + x[0, 2]) / 2, rtol=1e-6)
    assert not means[0, 1].any()
    assert soft_routing.slot_mask(mask, 3)[0].tolist() == [[True, False]] * 3


def drawn(rng, *shapes, size=1.0):
    return [jnp.asarray(size * rng.standard_normal(s), jnp.float32) for s in shapes]


def test_statistics_are_those_of_the_tokens_that_the_mask_keeps(rng):
    x, slots = drawn(rng, (1, 9, 6), (1, 3, 2, 6))
    mask = jnp.arange(9)[None] < 5
    ours = soft_routing.statistics(x, slots, token_mask=mask)
    kept = soft_routing.statistics(x[:, :5], slots)
    np.testing.assert_allclose(ours.importance(), kept.importance(), atol=1e-6)
    np.testing.assert_allclose(ours.load(), kept.load(), atol=1e-6)
    np.testing.assert_allclose(ours.dispatch_entropy, kept.dispatch_entropy, atol=1e-5)
    for name in ("combine_entropy", "combine_max", "expert_share"):
        by_token = getattr(ours, name)
        np.testing.assert_allclose(by_token[:, :5], getattr(kept, name), atol=1e-5)
        assert not by_token[:, 5:].any(), name


def test_a_sample_masked_as_a_whole_has_zeros_for_statistics(rng):
    x, slots = drawn(rng, (2, 6, 6), (2, 3, 2, 6))
    mask = jnp.asarray([[True] * 6, [False] * 6])
    filled = soft_routing.slot_mask(mask, 3)
    found = soft_routing.statistics(x, slots, token_mask=mask, slot_mask=filled)
    for name, of_samples in found._asdict().items():
        assert bool(jnp.isfinite(of_samples).all()), name
        assert of_samples[0].any() and not of_samples[1].any(), name
    assert not found.importance()[1].any() and not found.load()[1].any()


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
