import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from swinsmt_jax import SwinUNETRConfig, models
from swinsmt_jax.checks import UserError
from swinsmt_jax.config import InferenceConfig, from_config_dict
from swinsmt_jax.evaluation import routing


@pytest.fixture(scope="module")
def experiment():
    model = {"name": "swin_smt", "in_channels": 1, "out_channels": 3}
    model |= {"feature_size": 12, "num_experts": 4, "num_moe_stages": 1}
    model |= {"depths": (1, 1, 1, 1), "window_size": 4}
    return from_config_dict(
        {
            "model": model,
            "data": {"root": "x", "patch_shape": (32,) * 3, "batch_size": 1},
            "optimizer": {"learning_rate": 1e-3},
            "training": {"num_steps": 1},
        }
    )


def expert_shares(model, config, volume, block):
    return routing.expert_shares(
        model,
        config,
        volume,
        block=block,
        window=(32, 32, 32),
        inference=InferenceConfig(),
    )


@pytest.mark.slow
def test_shares_are_those_of_the_window(experiment, rng):
    model = models.create(experiment.model, rngs=nnx.Rngs(0))
    volume = rng.random((32, 32, 32, 1)).astype(np.float32)
    assert experiment.model.moe_strides == {"stage4/block0": 16}
    shares = expert_shares(model, experiment.model, volume, "stage4/block0")
    assert shares.shape == (32, 32, 32, 4)
    np.testing.assert_allclose(shares.sum(-1), 1, atol=1e-5)
    _, weights = model(jnp.asarray(volume[None]), return_routing=True)
    token = weights["stage4/block0"].combine[0, 5].sum(-1)  # at (1, 0, 1) of 2 x 2 x 2
    here = shares[16:, :16, 16:]
    np.testing.assert_allclose(here, np.broadcast_to(token, here.shape), atol=1e-5)


def test_groups_average_their_voxels():
    shares = np.asarray([[[[0.2, 0.8], [0.4, 0.6], [1.0, 0.0]]]], np.float32)
    labels = np.asarray([[[0, 1, 2]]])
    found = routing.shares_by_group(shares, labels, groups={"a": (1, 2), "b": (9,)})
    np.testing.assert_allclose(found["background"], [0.2, 0.8])
    np.testing.assert_allclose(found["a"], [0.7, 0.3])
    assert np.isnan(found["b"]).all()


def test_refuses_unknown_blocks_and_networks_without_experts(experiment):
    volume = np.zeros((32, 32, 32, 1), np.float32)
    with pytest.raises(UserError, match="block is 'stage1/block0'"):
        expert_shares(None, experiment.model, volume, "stage1/block0")
    with pytest.raises(UserError, match="no experts"):
        expert_shares(None, SwinUNETRConfig(1, 3, 12), volume, "stage4/block0")
