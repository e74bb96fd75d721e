"""The frequency prior around the optimiser."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from swinsmt_jax import models
from swinsmt_jax.config import OptimizerConfig
from swinsmt_jax.models.repux_net import RepUXNetConfig, frequency_prior
from swinsmt_jax.training import prior
from swinsmt_jax.training.optimizer import make_optimizer

CONFIG = RepUXNetConfig(in_channels=1, out_channels=2, kernel_size=5, alpha=2.0)
KERNEL = "uxnet_3d/stages/0/0/dwconv/kernel"


def tree(array):
    """Parameters with one depthwise kernel, and another one."""
    return {"stage": {"dwconv": {"kernel": array}}, "out": {"kernel": jnp.ones(3)}}


def updates(config, params, grads, steps=2, **options):
    """The parameters after some steps with one gradient, and the optimiser's state."""
    options = OptimizerConfig(0.1, weight_decay=0.3, clip_norm=0.5, **options)
    optimizer = make_optimizer(options, lambda step: 0.1, network=config)
    state = optimizer.init(params)
    for _ in range(steps):
        moves, state = optimizer.update(grads, state, params)
        params = jax.tree.map(jnp.add, params, moves)
    return params, state


def test_the_matrix():
    matrix = frequency_prior(21, 1.0)
    assert matrix.dtype == np.float32 and matrix[10, 10, 10] == 1
    assert matrix[10, 11, 10] == 0.5 and matrix[0, 0, 0] == pytest.approx(0.0546, 1e-3)
    assert float((matrix.astype(float) ** 2).sum()) == pytest.approx(107.46, 1e-4)
    assert dataclasses.replace(CONFIG, alpha=0.0).prior is None


def test_the_fixed_rule_learns_the_kernel_behind_the_product(rng):
    """AdamW, clipping and decay of W, with P W and its gradient outside."""
    weights = CONFIG.prior.weights
    w, g = (jnp.asarray(rng.normal(size=(5, 5, 5, 3)), jnp.float32) for _ in range(2))
    plain = dataclasses.replace(CONFIG, alpha=0.0)
    expected, _ = updates(plain, tree(w), tree(g * weights))
    found, state = updates(CONFIG, tree(w * weights), tree(g))
    np.testing.assert_allclose(
        found["stage"]["dwconv"]["kernel"],
        expected["stage"]["dwconv"]["kernel"] * weights,
        rtol=1e-4,
    )
    np.testing.assert_allclose(found["out"]["kernel"], expected["out"]["kernel"])
    _, without = updates(plain, tree(w), tree(g))
    assert jax.tree.structure(state) == jax.tree.structure(without)


@pytest.mark.parametrize("rule", ["released", "compound"])
def test_rules_that_weigh_the_kernel_in_every_step(rng, rule):
    config = dataclasses.replace(CONFIG, prior_rule=rule)
    weights = config.prior.weights
    w, g = (jnp.asarray(rng.normal(size=(5, 5, 5, 3)), jnp.float32) for _ in range(2))
    found, _ = updates(config, tree(w), tree(g))
    kernel = found["stage"]["dwconv"]["kernel"]
    if rule == "released":  # nothing is learnt
        np.testing.assert_allclose(kernel, w * weights**2, rtol=1e-5, atol=1e-7)
    else:
        assert (jnp.abs(kernel - w * weights**2).max(axis=(0, 1, 2)) > 0.05).all()
    frozen, _ = updates(config, tree(w), tree(g), freeze=("dwconv",))
    np.testing.assert_array_equal(frozen["stage"]["dwconv"]["kernel"], w)


def test_kernels_with_a_prior_are_not_joined_with_others():
    optimizer = make_optimizer(OptimizerConfig(0.1), lambda _: 0.1, network=CONFIG)
    others = {optimizer.kind(f"{KERNEL[:15]}{i}/dwconv/kernel") for i in range(3)}
    assert len(others) == 3
    assert optimizer.kind("encoder1/conv1/kernel") == optimizer.kind("out/kernel")


def test_the_names_of_the_rules_are_those_of_the_config():
    for rule in prior.RULES:
        assert dataclasses.replace(CONFIG, prior_rule=rule).prior.rule == rule
    with pytest.raises(ValueError, match="model.prior_rule .* must be one of"):
        dataclasses.replace(CONFIG, prior_rule="none")
    with pytest.raises(ValueError, match="model.kernel_size .* must be odd"):
        dataclasses.replace(CONFIG, kernel_size=4)
    _, params = models.abstract_model(CONFIG)
    names = jax.tree_util.tree_leaves_with_path(params)
    weighed = [p for p, _ in names if CONFIG.prior.acts_on(prior.path_name(p))]
    assert len(weighed) == sum(CONFIG.depths)
