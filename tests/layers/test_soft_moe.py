import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from swinsmt_jax.checks import UserError
from swinsmt_jax.layers.soft_moe import SoftMoE


@pytest.fixture
def moe():
    return SoftMoE(6, num_experts=3, rngs=nnx.Rngs(0))


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
    moe = SoftMoE(6, num_experts=2, dropout_rate=0.5, rngs=nnx.Rngs(0))
    x = jnp.asarray(rng.standard_normal((1, 7, 6)), jnp.float32)
    np.testing.assert_array_equal(moe(x), moe(x))
    dropped = [moe(x, key=jax.random.key(k)) for k in (0, 1)]
    assert not np.allclose(dropped[0], dropped[1])


@pytest.mark.parametrize("experts", [0, -2, 1.5])
def test_refuses_an_impossible_number_of_experts(experts):
    with pytest.raises(UserError, match=f"num_experts is {experts}"):
        SoftMoE(6, num_experts=experts, rngs=nnx.Rngs(0))


def test_refuses_volumes(moe):
    with pytest.raises(UserError, match=r"must be \[B, N, C\]"):
        moe(jnp.zeros((1, 2, 2, 2, 6)))


def with_routing(routing, **options):
    options = {"num_experts": 3, **options}
    return SoftMoE(6, routing=routing, rngs=nnx.Rngs(0), **options)


@pytest.mark.parametrize("slots", [{}, {"slots": "learned", "slots_per_expert": 2}])
def test_streaming_equals_dense_with_gradients(rng, slots):
    x = jnp.asarray(rng.standard_normal((2, 11, 6)), jnp.float32)
    mask = jnp.asarray(np.arange(11) < np.asarray([[11], [7]]))

    def run(routing):
        graphdef, params = nnx.split(with_routing(routing, **slots))

        def loss(params, x):
            y = nnx.merge(graphdef, params)(x, mask=mask)
            return jnp.square(y).sum(), y

        return jax.jit(jax.grad(loss, (0, 1), has_aux=True))(params, x)

    ours, theirs = (jax.tree.leaves(run(r)) for r in ("streaming", "dense"))
    for a, b in zip(ours, theirs, strict=True):
        scale = jnp.abs(b).max()
        np.testing.assert_allclose(a / scale, b / scale, rtol=0, atol=1e-5)


@pytest.mark.parametrize("routing", ["dense", "streaming"])
def test_masked_tokens_are_as_if_absent(rng, routing):
    moe = with_routing(routing)
    x = jnp.asarray(rng.standard_normal((1, 9, 6)), jnp.float32)
    mask = jnp.arange(9)[None] < 6
    y = moe(x, mask=mask)
    np.testing.assert_allclose(y[:, :6], moe(x[:, :6]), atol=1e-6)
    assert not y[:, 6:].any()


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
    assert temporaries(6000) < 4 * 6000**2


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
        ({"slots": "learned", "slots_per_expert": 0}, "slots_per_expert.* is 0"),
    ],
)
def test_refuses_impossible_options(options, words):
    with pytest.raises(UserError, match=words):
        SoftMoE(6, num_experts=2, rngs=nnx.Rngs(0), **options)


def test_refuses_fewer_tokens_than_experts(moe):
    with pytest.raises(UserError, match="2 tokens for num_experts = 3"):
        moe(jnp.zeros((1, 2, 6)))
