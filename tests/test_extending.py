"""The recipes of docs/extending.md run."""

import jax
import numpy as np
import pytest
from flax import nnx
from ml_collections import ConfigDict

from configs import demo
from swinsmt_jax import convert, models
from swinsmt_jax.config import from_config_dict
from swinsmt_jax.convert import files
from swinsmt_jax.models import registry
from swinsmt_jax.phantoms.dataset import write_dataset
from swinsmt_jax.training import checkpoint, loop, losses
from tests import recipes


@pytest.fixture(scope="module")
def phantoms(tmp_path_factory):
    root = tmp_path_factory.mktemp("phantoms")
    write_dataset(root, train=1, val=1, test=0, spacing=12, seed=0)
    return root


@pytest.mark.slow
def test_a_network_trains_and_gives_its_weights(phantoms, tmp_path):
    recipes.load("A network")
    values = demo.get_config()
    values.model = ConfigDict({"name": "res_unet", "in_channels": 1})
    values.model.update({"out_channels": 118, "width": 4})
    values.data.update({"root": str(phantoms), "patch_shape": (16, 16, 16)})
    values.data.batch_size = 8
    values.training.update({"num_steps": 2, "checkpoint_every": 1, "accumulate": 1})
    values.optimizer.warmup_steps = 1
    config = from_config_dict(values)
    assert isinstance(config.model, registry.config_class("res_unet"))
    loop.train(config, workdir=tmp_path / "run")
    _, model, info = checkpoint.load_model(tmp_path / "run")
    assert info["step"] == 2
    files.write(tmp_path / "w.safetensors", convert.to_torch(model))
    fresh = models.create(config.model, rngs=nnx.Rngs(1))
    convert.load_torch(fresh, files.read(tmp_path / "w.safetensors"))
    for name, array in convert.to_torch(model).items():
        np.testing.assert_array_equal(convert.to_torch(fresh)[name], array)


def test_a_loss(rng, monkeypatch):
    monkeypatch.setattr(losses, "LOSSES", dict(losses.LOSSES))
    monkeypatch.setattr(losses, "BLOCK", 1)  # a plane at a time
    exec(recipes.code("A loss"), {})
    loss = losses.make("jaccard_ce")
    features = rng.normal(size=(2, 4, 4, 4, 3)).astype(np.float32)
    labels = (features.sum(-1) > 0).astype(np.uint8)
    head = rng.normal(size=(3, 2)).astype(np.float32), np.zeros(2, np.float32)
    descend = jax.jit(
        jax.value_and_grad(lambda h: loss.of_features(features, *h, labels))
    )
    found = []
    for _ in range(20):
        value, gradient = descend(head)
        found.append(float(value))
        head = jax.tree.map(lambda p, g: p - g, head, gradient)
    assert found[-1] < 0.7 * found[0]
    logits = features @ head[0] + head[1]
    assert float(loss(logits, labels)) == pytest.approx(float(descend(head)[0]), 1e-5)
