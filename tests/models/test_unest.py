"""What is special about UNesT."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from swinsmt_jax import convert, models
from swinsmt_jax.checks import UserError
from swinsmt_jax.models import registry
from swinsmt_jax.models.unest import UNesTConfig, max_pool

SIZES = {"in_channels": 1, "out_channels": 118, "img_size": 96}
SMALL = {"feature_size": 8, "embed_dim": (64, 128, 256), "num_heads": (2, 4, 8)}
LARGE = {"feature_size": 24, "embed_dim": (192, 384, 768), "num_heads": (6, 12, 24)}


@pytest.mark.parametrize(
    ("changes", "count"),
    [
        ({"out_channels": 133}, 87_205_158),
        ({"img_size": 128}, 90_387_255),
        (SMALL, 22_402_007),
        ({**LARGE, "depths": (2, 2, 20)}, 279_462_551),
    ],
)
def test_parameters_of_the_other_forms(changes, count):
    assert models.count_parameters(UNesTConfig(**SIZES | changes)) == count


def test_the_shortcuts_of_old_checkpoints_are_passed_over(rng):
    tiny = registry.entry("unest").tiny
    config = UNesTConfig(in_channels=1, out_channels=3, **tiny)
    graphdef, shapes = models.abstract_model(config)
    model = nnx.merge(
        graphdef, jax.tree.map(lambda a: rng.random(a.shape, np.float32), shapes)
    )
    state_dict = convert.to_torch(model)
    third, fourth = (f"encoder{i}.layer.conv3.conv.weight" for i in (3, 4))
    assert third in state_dict and fourth not in state_dict  # the width changes or not
    unneeded = np.ones((16, 16, 1, 1, 1), np.float32)
    convert.load_torch(model, state_dict | {fourth: unneeded})
    np.testing.assert_array_equal(convert.to_torch(model)[third], state_dict[third])
    with pytest.raises(UserError, match=f"Missing: {third}"):
        convert.load_torch(model, {k: v for k, v in state_dict.items() if k != third})
    with pytest.raises(UserError, match="unexpected: encoder1.layer.conv4"):
        convert.load_torch(
            model, state_dict | {"encoder1.layer.conv4.conv.weight": unneeded}
        )


def test_max_pooling_equals_a_window_with_its_gradient(rng):
    x = jnp.asarray(rng.standard_normal((2, 4, 6, 2, 3)), jnp.float32)

    def by_window(x):
        window, strides = (1, 3, 3, 3, 1), (1, 2, 2, 2, 1)
        padding = [(size // 2,) * 2 for size in window]
        return jax.lax.reduce_window(x, -jnp.inf, jax.lax.max, window, strides, padding)

    @jax.jit
    def run(x):
        expected, wanted = jax.vjp(by_window, x)
        found, gradient = jax.vjp(max_pool, x)
        return (expected, *wanted(expected)), (found, *gradient(expected))

    for theirs, ours in zip(*run(x), strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_refuses_what_it_cannot_be_built_for():
    config = UNesTConfig(**SIZES)
    assert config.input_shape == (96, 96, 96)
    for changes, message in (
        ({"img_size": 80}, r"img_size has shape \(80, 80, 80\).* multiple of 32"),
        ({"img_size": 32}, "img_size is .* must be a cube of at least 64"),
        ({"img_size": (64, 96, 96)}, "img_size is .* must be a cube of at least 64"),
        ({"feature_size": 8}, "embed_dim is .* 32 times model.feature_size = 8: 256"),
        ({"num_heads": (3, 8, 16)}, "3 heads do not divide the 128 channels"),
        ({"depths": (2, 2)}, "depths is .* must have 3 entries"),
    ):
        with pytest.raises(UserError, match=message):
            dataclasses.replace(config, **changes)
