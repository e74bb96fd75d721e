import jax
import jax.numpy as jnp
import numpy as np
import pytest

from swinsmt_jax import SwinSMTConfig
from swinsmt_jax.checks import UserError
from swinsmt_jax.config import OptimizerConfig
from swinsmt_jax.models import abstract_model
from swinsmt_jax.models.nnformer import NNFormerConfig
from swinsmt_jax.models.unetr import UNETRConfig
from swinsmt_jax.models.ux_net import UXNetConfig
from swinsmt_jax.sharding import path_name
from swinsmt_jax.training.optimizer import (
    make_optimizer,
    make_schedule,
    require_effect,
)


def test_the_rate_rises_linearly_and_falls_along_a_cosine():
    config = OptimizerConfig(0.5, warmup_steps=10, final_ratio=0.1)
    rates = np.array([make_schedule(config, num_steps=110)(s) for s in range(111)])
    np.testing.assert_allclose(rates[:10], 0.05 * np.arange(1, 11), rtol=1e-6)
    assert rates[10] == pytest.approx(0.5) and rates[60] == pytest.approx(0.275)
    assert rates[110] == pytest.approx(0.05)
    assert (np.diff(rates[10:]) < 0).all()


def test_without_warm_up_the_first_step_has_the_full_rate():
    schedule = make_schedule(OptimizerConfig(0.5), num_steps=4)
    assert float(schedule(0)) == 0.5 and float(schedule(4)) == pytest.approx(0)
    assert float(schedule(9)) == pytest.approx(0)  # and no rise again


SMALL = dict(in_channels=1, out_channels=5)
NETWORK = SwinSMTConfig(**SMALL, feature_size=12, num_experts=4, num_moe_stages=1)


@pytest.mark.parametrize(
    "config, kernels",
    [
        (
            SwinSMTConfig(
                **SMALL,
                feature_size=12,
                num_experts=4,
                num_moe_stages=1,
                patch_norm=True,
            ),
            {"kernel", "slot_kernel", "w1", "w2"},
        ),
        (
            SwinSMTConfig(
                **SMALL,
                feature_size=12,
                num_experts=4,
                num_moe_stages=1,
                slots="learned",
                slots_per_expert=2,
            ),
            {"kernel", "w1", "w2"},
        ),
        (UNETRConfig(**SMALL, img_size=32), {"kernel"}),
        (UXNetConfig(**SMALL), {"kernel"}),
        (NNFormerConfig(**SMALL, crop_size=64), {"kernel"}),
    ],
)
def test_kernels_alone_are_decayed(config, kernels):
    _, params = abstract_model(config)
    leaves = jax.tree_util.tree_flatten_with_path(params)[0]
    names = [path_name(path) for path, _ in leaves]
    assert {n.split("/")[-1] for n in names if config.is_decayed(n)} == kernels


def test_decay_is_decoupled_and_gradients_are_clipped():
    config = OptimizerConfig(0.1, weight_decay=0.5, clip_norm=1.0, b1=0.0, b2=0.0)
    optimizer = make_optimizer(
        config, make_schedule(config, num_steps=10), network=NETWORK
    )
    params = {"kernel": jnp.full(2, 3.0), "bias": jnp.full(2, 3.0)}
    zero = jax.tree.map(jnp.zeros_like, params)
    updates, _ = optimizer.update(zero, optimizer.init(params), params)
    np.testing.assert_allclose(updates["kernel"], -0.1 * 0.5 * 3.0, rtol=1e-6)
    np.testing.assert_array_equal(updates["bias"], 0)
    large = jax.tree.map(lambda p: jnp.full_like(p, 1e6), params)
    _, state = optimizer.update(large, optimizer.init(params), params)
    seen = jax.tree.leaves(state[1][0].mu)  # with b1 = 0, the clipped gradient
    assert np.sqrt(sum(float((g**2).sum()) for g in seen)) == pytest.approx(1, 1e-5)


def test_frozen_parameters_keep_their_value_and_do_not_count():
    params = {"a": {"kernel": jnp.ones(2)}, "b": {"kernel": jnp.ones(2)}}
    grads = {"a": {"kernel": jnp.full(2, 1e6)}, "b": {"kernel": jnp.full(2, 0.1)}}
    config = OptimizerConfig(0.1, freeze=("^a/",), weight_decay=0.1)
    alone = make_optimizer(
        OptimizerConfig(0.1, weight_decay=0.1), lambda step: 0.1, network=NETWORK
    )
    optimizer = make_optimizer(config, lambda step: 0.1, network=NETWORK)
    updates, state = optimizer.update(grads, optimizer.init(params), params)
    assert not updates["a"]["kernel"].any()
    part = {"b": params["b"]}
    expected, _ = alone.update({"b": grads["b"]}, alone.init(part), part)
    np.testing.assert_allclose(updates["b"]["kernel"], expected["b"]["kernel"])


def test_layers_far_from_the_decoder_learn_slowly():
    names = ("patch_embed", "layers1", "layers4")
    params = {"swinViT": {n: jnp.ones(2) for n in names}, "out": jnp.ones(2)}
    grads = jax.tree.map(lambda a: 0.1 * a, params)
    config = OptimizerConfig(1.0, layer_decay=0.5, weight_decay=0.0)
    optimizer = make_optimizer(config, lambda step: 1.0, network=NETWORK)
    updates, _ = optimizer.update(grads, optimizer.init(params), params)
    rates = [updates["swinViT"][n][0] / updates["out"][0] for n in names]
    np.testing.assert_allclose(rates, [0.5**5, 0.5**4, 0.5], rtol=1e-6)


@pytest.mark.parametrize(
    "freeze, words",
    [(("nothing",), "matches no parameter"), (("a", "b"), "freezes all parameters")],
)
def test_patterns_must_leave_something_to_learn(freeze, words):
    params = {"a": {"kernel": jnp.ones(2)}, "b": {"kernel": jnp.ones(2)}}
    with pytest.raises(UserError, match=words):
        require_effect(OptimizerConfig(0.1, freeze=freeze), params)
    with pytest.raises(UserError, match="is not a regular expression"):
        OptimizerConfig(0.1, freeze=("(",))
