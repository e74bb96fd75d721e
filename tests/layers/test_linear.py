import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from swinsmt_jax.layers import initializers, linear
from swinsmt_jax.ops.normalization import rms_norm, standardize


def test_initial_weights_are_uniform_within_pytorchs_bound():
    layer = linear.linear(400, 300, rngs=nnx.Rngs(0))
    for values in (layer.kernel[...], layer.bias[...]):
        assert float(jnp.abs(values).max()) <= 0.05
        np.testing.assert_allclose(values.std(), 0.05 / 3**0.5, rtol=0.1)


def test_initial_values_are_independent_and_the_same_under_sharding():
    shape = (200, 64)

    def draw():
        rngs = nnx.Rngs(0)
        first = initializers.uniform_fan_in(rngs, shape, fan_in=1)[...]
        return first, initializers.truncated_normal(rngs, shape, stddev=0.5)[...]

    first, second = jax.jit(draw)()
    mesh = jax.make_mesh((8,), ("d",), axis_types=(jax.sharding.AxisType.Auto,))
    split = jax.NamedSharding(mesh, jax.P("d"))
    for a, b in zip(jax.jit(draw, out_shardings=split)(), (first, second), strict=True):
        np.testing.assert_array_equal(a, b)
    assert abs(np.corrcoef(first.ravel(), second.ravel())[0, 1]) < 0.03
    rows = np.corrcoef(first)
    assert np.abs(rows - np.eye(200)).max() < 0.6
    assert abs(first.mean()) < 0.02 and float(jnp.abs(second).max()) <= 1.0
    np.testing.assert_allclose(second.std(), 0.5 * 0.88, rtol=0.02)


def test_standardize_has_zero_mean_and_unit_variance(rng):
    x = jnp.asarray(5 + 3 * rng.standard_normal((2, 6, 7, 8, 3)), jnp.bfloat16)
    y = standardize(x, (1, 2, 3))
    assert y.dtype == jnp.float32
    np.testing.assert_allclose(y.mean((1, 2, 3)), 0, atol=1e-5)
    np.testing.assert_allclose(y.std((1, 2, 3)), 1, atol=1e-4)


def test_rms_norm_has_length_sqrt_c(rng):
    x = jnp.asarray(rng.standard_normal((4, 9)), jnp.float32)
    y = rms_norm(x, jnp.ones(9))
    np.testing.assert_allclose(jnp.linalg.norm(y, axis=-1), 3, rtol=1e-5)


def test_gelu_is_exact(rng):
    x = jnp.asarray(rng.standard_normal(100), jnp.float32)
    expected = jax.nn.gelu(x, approximate=False)
    np.testing.assert_allclose(linear.gelu(x), expected, atol=1e-6)
    slope = jax.vmap(jax.grad(linear.gelu))(x)
    expected = jax.vmap(jax.grad(lambda x: jax.nn.gelu(x, approximate=False)))(x)
    np.testing.assert_allclose(slope, expected, atol=1e-6)


def test_dropout_keeps_the_mean_and_drop_path_whole_samples():
    x, key = jnp.ones((1000, 20)), jax.random.key(0)
    y = linear.dropout(x, rate=0.3, key=key)
    assert set(np.unique(y)) == {0, np.float32(1 / 0.7)}
    np.testing.assert_allclose(y.mean(), 1, atol=0.03)
    z = linear.drop_path(x, rate=0.3, key=key)
    assert bool((z == z[:, :1]).all())
    np.testing.assert_allclose(z.mean(), 1, atol=0.1)
    assert not linear.dropout(x, rate=1.0, key=key).any()
    np.testing.assert_array_equal(linear.dropout(x, rate=0.3, key=None), x)
