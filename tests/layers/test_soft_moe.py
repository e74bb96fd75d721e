import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from swinsmt_jax.checks import UserError
from swinsmt_jax.layers.soft_moe import SoftMoE, SoftMoEConfig
from swinsmt_jax.ops import blockwise_attention, by_platform
from tests import recipes


@pytest.fixture
def moe():
    return with_routing("auto")


def test_output_mixes_the_experts_by_the_routing_weights(moe, rng):
    x = jnp.asarray(rng.standard_normal((2, 8, 6)), jnp.float32)
    y, routing = moe(x, return_routing=True)
    np.testing.assert_array_equal(y, moe(x))
    assert routing.dispatch.shape == routing.combine.shape == (2, 8, 3, 3)
    unit = x / jnp.linalg.norm(x, axis=-1, keepdims=True) * 6**0.5
    slots = jnp.einsum("bnes,bnc->besc", routing.dispatch, unit)
    expected = jnp.einsum("bnes,besc->bnc", routing.combine, moe.experts(slots))
    np.testing.assert_allclose(y, expected, atol=1e-5)


def test_samples_do_not_see_each_other(moe, rng):
    x = jnp.asarray(rng.standard_normal((2, 7, 6)), jnp.float32)
    np.testing.assert_allclose(moe(x)[1:], moe(x[1:]), atol=1e-6)


def test_scale_of_a_token_does_not_matter(moe, rng):
    x = jnp.asarray(rng.standard_normal((1, 7, 6)), jnp.float32)
    np.testing.assert_allclose(moe(x), moe(100 * x), atol=1e-4)


def test_zero_tokens_have_finite_gradients(moe):
    gradient = jax.grad(lambda x: moe(x).sum())(jnp.zeros((1, 5, 6)))
    assert bool(jnp.isfinite(gradient).all())


def test_dropout_needs_a_key(rng):
    options = SoftMoEConfig(num_experts=2)
    moe = SoftMoE(6, options, dropout_rate=0.5, rngs=nnx.Rngs(0))
    x = jnp.asarray(rng.standard_normal((1, 7, 6)), jnp.float32)
    np.testing.assert_array_equal(moe(x), moe(x))
    dropped = [moe(x, key=jax.random.key(k)) for k in (0, 1)]
    assert not np.allclose(dropped[0], dropped[1])


@pytest.mark.parametrize("experts", [0, -2, 1.5])
def test_refuses_an_impossible_number_of_experts(experts):
    with pytest.raises(UserError, match=f"num_experts is {experts}"):
        SoftMoEConfig(num_experts=experts)


@pytest.mark.parametrize("shape", [(1, 2, 2, 2, 6), (2, 5, 7), (0, 5, 6), (2, 0, 6)])
def test_refuses_tokens_of_another_shape(moe, shape):
    with pytest.raises(UserError, match=r"must be \[B, N, C\] with C = 6"):
        moe(jnp.zeros(shape))


def with_routing(routing, **options):
    options = SoftMoEConfig(num_experts=3, routing=routing, **options)
    return SoftMoE(6, options, rngs=nnx.Rngs(0))


def value_and_gradients(moe, x, *, weights=None, wrap=lambda f: f):
    """Output, and gradients of its product with weights by parameters and tokens."""
    graphdef, params = nnx.split(moe)
    apply = wrap(lambda params, x: nnx.merge(graphdef, params)(x))

    def loss(params, x):
        y = apply(params, x)
        return (jnp.square(y) if weights is None else y * weights).sum(), y

    gradients, y = jax.jit(jax.grad(loss, (0, 1), has_aux=True))(params, x)
    return [y, *jax.tree.leaves(gradients)]


def assert_same(ours, theirs):
    for a, b in zip(ours, theirs, strict=True):
        scale = max(float(jnp.abs(b).max()), 1e-30)
        np.testing.assert_allclose(a / scale, b / scale, rtol=0, atol=1e-5)


LEARNED = {"slots": "learned", "slots_per_expert": 2}


@pytest.mark.parametrize("slots", [{}, LEARNED])
def test_streaming_equals_dense_with_gradients(rng, slots):
    x = jnp.asarray(rng.standard_normal((2, 11, 6)), jnp.float32)
    ours, theirs = (
        value_and_gradients(with_routing(r, **slots), x) for r in ("streaming", "dense")
    )
    assert_same(ours, theirs)


@settings(max_examples=5, deadline=None, phases=[Phase.generate])  # shrinking compiles
@given(
    seed=st.integers(0, 1000),
    tokens=st.sampled_from([3, 17, 40]),
    slots=st.sampled_from([{}, LEARNED]),
    scale=st.sampled_from([0.3, 1.0, 3.0, 100.0]),
)
def test_streaming_equals_dense_for_any_shape_and_logits(seed, tokens, slots, scale):
    # Logits reach 6 scale^2: C, nine times and ten thousand times as much. There their
    # rounding, some 0.01, is a relative error of the weights.
    rng = np.random.default_rng(seed)
    x, weights = rng.standard_normal((2, 2, tokens, 6)).astype("f4")

    def run(routing):
        moe = with_routing(routing, **slots)
        moe.gamma[...] *= scale
        gamma = moe.slot_gamma if not slots else moe.slot_norm_gamma
        gamma[...] *= scale
        return value_and_gradients(moe, x, weights=weights)

    with pytest.MonkeyPatch.context() as patch:
        blocks = {"cpu": (8, 16), "default": (8, 16)}
        attend = by_platform.blocked(blockwise_attention, blocks)
        patch.setattr(by_platform, "attend", lambda *a, fused: attend(*a))
        ours, theirs = run("streaming"), run("dense")
    assert all(bool(jnp.isfinite(a).all()) for a in (*ours, *theirs))
    if scale < 100:
        assert_same(ours, theirs)


@pytest.mark.parametrize("routing", ["dense", "streaming"])
def test_rematerialisation_and_vmap_change_nothing(rng, routing):
    moe = with_routing(routing)
    x = jnp.asarray(rng.standard_normal((3, 11, 6)), jnp.float32)

    def mapped(f):
        one = jax.vmap(lambda params, x: f(params, x[None])[0], (None, 0))
        return lambda params, x: one(params, x)

    expected = value_and_gradients(moe, x)
    assert_same(value_and_gradients(moe, x, wrap=jax.checkpoint), expected)
    assert_same(value_and_gradients(moe, x, wrap=mapped), expected)


def test_statistics_stream_and_weights_are_dense(rng):
    x = jnp.asarray(rng.standard_normal((1, 11, 6)), jnp.float32)
    moe = with_routing("streaming")
    y, statistics = moe(x, return_routing="statistics")
    _, weights = moe(x, return_routing=True)
    np.testing.assert_allclose(y, moe(x), atol=1e-6)
    share = weights.combine.sum(-1)
    np.testing.assert_allclose(statistics.expert_share, share, atol=1e-5)


def test_auto_streams_many_tokens():
    graphdef, params = nnx.split(with_routing("auto"))

    def temporaries(n):
        x = jax.ShapeDtypeStruct((1, n, 6), jnp.float32)
        run = jax.jit(lambda p, x: nnx.merge(graphdef, p)(x))
        memory = run.lower(params, x).compile().memory_analysis()
        return memory.temp_size_in_bytes

    assert temporaries(600) > 4 * 600**2  # dense
    assert temporaries(1600) < 4 * 1600**2


def test_learned_slots_are_parameters(rng):
    moe = with_routing("dense", slots="learned", slots_per_expert=2)
    x = jnp.asarray(rng.standard_normal((2, 7, 6)), jnp.float32)
    _, routing = moe(x, return_routing=True)
    assert routing.dispatch.shape == (2, 7, 3, 2)
    slots = moe.slot_embeddings(x)
    np.testing.assert_array_equal(slots[0], slots[1])


@pytest.mark.parametrize(
    "options, words",
    [
        ({"routing": "sparse"}, "routing is 'sparse'"),
        ({"slots": 0}, "slots is 0"),
        ({"slots": "learned", "slots_per_expert": 0}, "slots_per_expert is 0"),
        ({"slots_per_expert": 2}, "slots_per_expert is 2, but dynamic slots"),
    ],
)
def test_refuses_impossible_options(options, words):
    with pytest.raises(UserError, match=words):
        SoftMoEConfig(num_experts=2, **options)


def test_refuses_fewer_tokens_than_experts(moe):
    with pytest.raises(UserError, match="2 tokens for num_experts = 3"):
        moe(jnp.zeros((1, 2, 6)))


@pytest.mark.parametrize("routing", ["dense", "streaming"])
def test_the_recipe_of_an_option(rng, routing):
    recipe = recipes.load("An option of the routing")

    def tempered(temperature):
        options = recipe.TemperedConfig(num_experts=3, routing=routing, tempered=True)
        moe = recipe.TemperedSoftMoE(6, options, rngs=nnx.Rngs(0))
        moe.temperature[...] *= temperature
        return moe

    x = jnp.asarray(rng.standard_normal((1, 11, 6)), jnp.float32)
    y = with_routing(routing)(x)
    np.testing.assert_allclose(tempered(1)(x), y, atol=1e-6)
    graphdef, params = nnx.split(tempered(2))
    gradient = jax.grad(lambda p: jnp.square(nnx.merge(graphdef, p)(x)).sum())(params)
    assert abs(float(gradient.temperature[...][0])) > 1e-4
    _, statistics = tempered(1e6)(x, return_routing="statistics")
    np.testing.assert_allclose(statistics.dispatch_max, 1 / 11, rtol=1e-4)
