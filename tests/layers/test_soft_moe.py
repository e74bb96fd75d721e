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
