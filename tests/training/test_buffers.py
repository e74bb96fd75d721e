"""Arrays of a network that no gradient moves: carried, saved, divided and evaluated."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from flax import nnx

from swinsmt_jax import SwinUNETRConfig, models, sharding
from swinsmt_jax.checks import UserError
from swinsmt_jax.config import MeshConfig
from swinsmt_jax.layers.conv import BatchNorm
from swinsmt_jax.models import network
from swinsmt_jax.training.checkpoint import load_model, open_checkpoints, origin_of
from swinsmt_jax.training.state import initialize
from swinsmt_jax.training.step import make_predict
from tests.training.test_step import prepare, random_batch

SHIFT = np.float32([0.1, 0.2, 0.3, 0.7])


class Normed(nnx.Module):
    """A linear map with batch norm, and a buffer that stays as it is."""

    def __init__(self, config, *, rngs):
        self.config = config
        self.stem = nnx.Linear(1, 6, rngs=rngs)
        self.norm = BatchNorm(6)
        self.shift = nnx.Variable(jnp.asarray(SHIFT))
        self.out = nnx.Linear(6, config.out_channels, rngs=rngs)

    def __call__(self, x, *, rngs=None):
        y = self.norm(self.stem(x * 4), training=rngs is not None)
        return self.out(jnp.tanh(y)) + self.shift[...]


@pytest.fixture
def start(monkeypatch, make_config):
    """Make a step and the first state of that network, on a number of devices."""
    monkeypatch.setattr(
        network, "create", lambda config, rngs: Normed(config, rngs=rngs)
    )

    def make(devices=1, **options):
        averaged = options.get("ema_decay", 0.0)
        config = make_config(training={"num_steps": 6, "ema_decay": averaged})
        config = dataclasses.replace(config, model=SwinUNETRConfig(1, 4, 12))
        mesh = sharding.make_mesh(MeshConfig(devices, 1))
        step, abstract, optimizer, graphdef = prepare(
            config.model, config.optimizer, mesh=mesh, **options
        )
        state = initialize(config.model, optimizer, seed=0, abstract=abstract)
        predict = make_predict(graphdef, abstract=abstract, mesh=mesh)

        def take(state, batch):
            return step(state, sharding.place_batch(batch, mesh))

        return take, state, abstract, predict, config

    return make


def statistics(state):
    return jax.tree.map(np.asarray, state.buffers["norm"])


def test_statistics_follow_the_global_batch_on_any_number_of_devices(start, rng):
    batches = [random_batch(rng, batch=8, side=4, classes=4) for _ in range(2)]
    found = []
    for devices in (1, 8):
        take, state, *_ = start(devices)
        stem = jax.tree.map(np.asarray, state.params["stem"])
        y = batches[0]["image"] * 4 @ stem["kernel"] + stem["bias"]
        state, _ = take(state, batches[0])
        running = statistics(state)
        state, metrics = take(state, batches[1])
        found.append((running, statistics(state)["running_var"], metrics["loss"]))
    mean, variance = y.mean((0, 1, 2, 3)), y.var((0, 1, 2, 3), ddof=1)
    close = functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-6)
    jax.tree.map(close, *found)
    close(running["running_mean"], 0.1 * mean)
    close(running["running_var"], 0.9 + 0.1 * variance)
    np.testing.assert_array_equal(state.buffers["shift"], SHIFT)


def test_parts_of_a_batch_move_the_statistics_in_turn(start, rng):
    batch = random_batch(rng, batch=4, side=4, classes=4)
    take, state, *_ = start(accumulate=2)
    stem = jax.tree.map(np.asarray, state.params["stem"])
    state, _ = take(state, batch)
    y = batch["image"] * 4 @ stem["kernel"] + stem["bias"]
    mean = np.zeros(6)
    for part in (y[0::2], y[1::2]):
        mean = 0.9 * mean + 0.1 * part.mean((0, 1, 2, 3))
    np.testing.assert_allclose(statistics(state)["running_mean"], mean, rtol=1e-4)


def test_a_skipped_step_leaves_them_and_evaluation_uses_them(start, rng):
    take, state, _, predict, _ = start(ema_decay=0.5)
    good = random_batch(rng, batch=2, side=4, classes=4)
    state, _ = take(state, good)
    before = statistics(state)
    logits = predict(state.arrays, good["image"])
    bad = good | {"image": np.full_like(good["image"], np.inf)}
    state, metrics = take(state, bad)
    assert int(metrics["skipped"]) == 1
    jax.tree.map(np.testing.assert_array_equal, statistics(state), before)
    np.testing.assert_array_equal(predict(state.arrays, good["image"]), logits)
    # The average is of the statistics too, with a first decay of 1 / 10.
    average = state.evaluated_params["norm"]["running_mean"]
    np.testing.assert_allclose(average, 0.9 * before["running_mean"], rtol=1e-5)
    np.testing.assert_array_equal(
        state.evaluated_params["shift"], state.buffers["shift"]
    )
    assert (predict(state.evaluated_params, good["image"]) != logits).any()


@pytest.mark.parametrize("ema_decay", [0.0, 0.5])
def test_a_run_with_statistics_resumes_bit_for_bit(start, rng, tmp_path, ema_decay):
    batches = [random_batch(rng, batch=2, side=4, classes=4) for _ in range(3)]
    take, state, abstract, predict, config = start(ema_decay=ema_decay)
    state, _ = take(state, batches[0])
    origin = origin_of(config, data="abc")
    with open_checkpoints(tmp_path) as checkpoints:
        checkpoints.save(state, origin=origin)
    expected = predict(state.evaluated_params, batches[0]["image"])
    for batch in batches[1:]:
        state, _ = take(state, batch)
    with open_checkpoints(tmp_path) as checkpoints:
        again = checkpoints.restore_latest(abstract, origin=origin)
    for batch in batches[1:]:
        again, _ = take(again, batch)
    assert jax.tree.structure(again) == jax.tree.structure(state)
    jax.tree.map(np.testing.assert_array_equal, again, state)
    _, model, _ = load_model(tmp_path)
    found = jax.jit(lambda m, x: m(x))(model, batches[0]["image"])
    np.testing.assert_array_equal(found, expected)


def test_checkpoints_of_networks_without_buffers_are_those_of_before(
    tiny, make_config, tmp_path
):
    config = make_config()
    mesh = sharding.make_mesh(MeshConfig(1, 1))
    _, abstract, optimizer, _ = prepare(config.model, config.optimizer, mesh=mesh)
    state = initialize(config.model, optimizer, seed=0, abstract=abstract)
    assert state.buffers == {} and state.arrays is state.params
    with open_checkpoints(tmp_path) as checkpoints:
        checkpoints.save(state, origin=origin_of(config, data="abc"))
    with ocp.PyTreeCheckpointer() as reader:
        tree = reader.metadata(tmp_path / "checkpoints/0/state").item_metadata.tree
    assert set(tree) == {"step", "params", "opt_state", "average", "skipped"}


def test_a_checkpoint_without_statistics_is_of_another_model(start, tmp_path):
    _, state, abstract, _, config = start()
    origin = origin_of(config, data="abc")
    with open_checkpoints(tmp_path) as checkpoints:
        checkpoints.save(dataclasses.replace(state, buffers={}), origin=origin)
    with (
        open_checkpoints(tmp_path) as checkpoints,
        pytest.raises(UserError, match=r"norm/running_mean: absent in the checkpoint"),
    ):
        checkpoints.restore_latest(abstract, origin=origin)


def test_parameters_and_buffers_are_taken_apart_and_put_together(start, make_config):
    *_, config = start()
    graphdef, arrays = models.abstract_model(config.model)
    params, buffers = models.split_buffers(graphdef, arrays)
    assert set(buffers) == {"norm", "shift"} and set(params["norm"]) == {
        "scale",
        "bias",
    }
    assert models.merge_buffers(params, buffers) == arrays
    assert models.count_parameters(config.model) == 2 * 6 + 2 * 6 + 6 * 4 + 4
