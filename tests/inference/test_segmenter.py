import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from swinsmt_jax import SwinUNETRConfig
from swinsmt_jax.checks import UserError
from swinsmt_jax.inference.segmenter import computing_in, left_right_swap, predict_fn
from swinsmt_jax.labels import CLASS_NAMES
from swinsmt_jax.models import abstract_model


def test_a_trained_network_computes_in_another_dtype(rng):
    trained = SwinUNETRConfig(1, 4, 12)
    graphdef, shapes = abstract_model(trained)
    params = jax.tree.map(lambda x: rng.normal(0, 0.1, x.shape).astype("f4"), shapes)
    model = nnx.merge(graphdef, params)
    changed, other = computing_in("bfloat16", trained, model)
    assert changed.dtype == "bfloat16" and trained.dtype == "float32"
    assert {x.dtype for x in jax.tree.leaves(nnx.state(other))} == {np.dtype("f4")}
    window = jnp.ones((1, 32, 32, 32, 1))
    text = [str(jax.make_jaxpr(lambda x, m=m: m(x))(window)) for m in (model, other)]
    assert ["bf16" in x for x in text] == [False, True]
    assert computing_in(None, trained, model) == (trained, model)
    with pytest.raises(UserError, match="dtype is 'float8'"):
        computing_in("float8", trained, model)


def test_a_model_is_an_argument_of_the_compiled_function():
    model = jax.tree_util.Partial(lambda weight, x: x * weight, jnp.float32(2))
    twice = predict_fn(model)(jnp.ones((1, 2)))
    other = jax.tree_util.Partial(model.func, jnp.float32(3))
    thrice = predict_fn(other)(jnp.ones((1, 2)))
    assert twice.tolist() == [[2, 2]] and thrice.tolist() == [[3, 3]]


def test_a_window_and_its_mirror_image_are_averaged(rng):
    """Of a network that sees class 1 on the right and 2 on the left, twice as well."""
    side = jnp.linspace(-1, 1, 6)[None, :, None, None, None]

    def network(windows):
        right = jnp.maximum(side, 0) * windows
        left = jnp.maximum(-side, 0) * windows
        return jnp.concatenate([0 * windows, right, 2 * left], axis=-1)

    predict = predict_fn(
        jax.tree_util.Partial(network), left_right_swap=np.array([0, 2, 1])
    )
    windows = rng.random((2, 6, 5, 4, 1)).astype(np.float32)
    right, left = np.maximum(side, 0), np.maximum(-side, 0)
    expected = 1.5 * np.concatenate([0 * windows, right * windows, left * windows], -1)
    np.testing.assert_allclose(predict(windows), expected, rtol=1e-6)


def test_counterparts_that_the_network_lacks_are_refused():
    swap = left_right_swap(CLASS_NAMES, num_classes=4)
    assert swap.tolist() == [0, 1, 3, 2]  # the kidneys
    with pytest.raises(UserError, match=r"counterpart beyond: \[2\]"):
        left_right_swap(CLASS_NAMES, num_classes=3)
