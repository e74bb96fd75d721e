import dataclasses
import functools
import importlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from swinsmt_jax import SwinSMTConfig, sharding
from swinsmt_jax.config import MeshConfig, OptimizerConfig, from_config_dict
from swinsmt_jax.layers.conv import Conv
from swinsmt_jax.models import registry
from swinsmt_jax.ops import by_platform
from swinsmt_jax.training import losses, packing
from swinsmt_jax.training.optimizer import make_optimizer, make_schedule
from swinsmt_jax.training.state import abstract_state, initialize, shardings_of
from swinsmt_jax.training.step import (
    loss_and_accuracy_counts,
    make_predict,
    make_train_step,
)

LOSS = losses.make("dice_ce")


def prepare(
    model, optimizer_config, *, mesh, num_steps=10, seed=0, loss=LOSS, **options
):
    """Everything but the parameters: (step, abstract state, optimizer, graphdef)."""
    schedule = make_schedule(optimizer_config, num_steps=num_steps)
    optimizer = make_optimizer(optimizer_config, schedule, network=model)
    averaged = bool(options.get("ema_decay"))
    graphdef, abstract = abstract_state(model, optimizer, mesh=mesh, averaged=averaged)
    step = make_train_step(
        graphdef,
        optimizer,
        loss=loss,
        schedule=schedule,
        seed=seed,
        abstract=abstract,
        mesh=mesh,
        **options,
    )
    return step, abstract, optimizer, graphdef


def random_batch(rng, *, batch, side, classes):
    image = rng.random((batch, side, side, side, 1), np.float32)
    label = (image[..., 0] * classes).astype(np.uint8)
    return {"image": image, "label": label, "case": np.zeros(batch, np.int32)}


def random_state(abstract, rng):
    """Parameters as after initialisation, without compiling that."""

    def draw(leaf):
        if leaf.ndim == 1:  # scales and biases
            return rng.uniform(0.5, 1, leaf.shape).astype(np.float32)
        bound = np.prod(leaf.shape[:-1]) ** -0.5
        return rng.uniform(-bound, bound, leaf.shape).astype(np.float32)

    parts = {p: jax.tree.map(draw, getattr(abstract, p)) for p in ("params", "buffers")}
    zeros = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), abstract)
    state = dataclasses.replace(zeros, **parts)
    return jax.device_put(state, shardings_of(abstract))


@pytest.fixture
def start(tiny, make_config):
    """Make a step, a state and its shapes for the tiny network."""

    def make(*, data=1, expert=1, dropout=0.0, seed=0, options=None, **optimizer):
        config = make_config(model={"dropout": dropout}, optimizer=optimizer)
        mesh = sharding.make_mesh(MeshConfig(data, expert))
        step, abstract, optimizer, graphdef = prepare(
            config.model, config.optimizer, mesh=mesh, seed=seed, **(options or {})
        )
        state = initialize(config.model, optimizer, seed=0, abstract=abstract)
        return step, state, abstract, graphdef, mesh

    return make


def test_parameters_are_updated_alike_joined_and_each_by_itself(
    start, rng, monkeypatch
):
    found = []
    batches = [random_batch(rng, batch=1, side=32, classes=3) for _ in range(2)]
    for small in (packing.SMALL, 0):
        monkeypatch.setattr(packing, "SMALL", small)
        step, state, *_ = start(
            options={"ema_decay": 0.5}, layer_decay=0.5, freeze=("swinViT/patch_embed",)
        )
        for batch in batches:
            state, metrics = step(state, batch)
        found.append((state, metrics))
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5), *found)


def test_steps_lower_the_loss_and_count(start, rng):
    step, state, *_ = start(learning_rate=0.05, warmup_steps=2)
    batch = random_batch(rng, batch=2, side=8, classes=4)
    found, rates = [], []
    for _ in range(10):
        state, metrics = step(state, batch)
        found.append(float(metrics["loss"]))
        rates.append(float(metrics["learning_rate"]))
    assert found[-1] < 0.8 * found[0] and int(state.step) == 10
    assert rates[:2] == pytest.approx([0.025, 0.05]) and rates[-1] < 0.01
    assert float(metrics["grad_norm"]) > 0
    assert 0.3 < float(metrics["accuracy"]) <= 1


def test_the_state_is_donated_and_stays_where_it_was(start, rng):
    step, state, abstract, *_ = start(data=2, expert=2)
    batch = random_batch(rng, batch=4, side=8, classes=4)
    new, _ = step(state, batch)
    assert state.params["stem"]["kernel"].is_deleted()
    equal = jax.tree.map(lambda a, b: a.sharding == b.sharding, new, abstract)
    assert all(jax.tree.leaves(equal))


@pytest.mark.parametrize("ema_decay", [0.0, 0.9])
def test_the_state_is_overwritten_without_a_copy(tiny, make_config, ema_decay):
    model = make_config(model={"num_experts": 8, "feature_size": 192}).model
    mesh = sharding.make_mesh(MeshConfig(1, 1))
    step, abstract, *_ = prepare(
        model, OptimizerConfig(1e-2), mesh=mesh, ema_decay=ema_decay
    )
    batch = {
        "image": jax.ShapeDtypeStruct((1, 2, 2, 2, 1), jnp.float32),
        "label": jax.ShapeDtypeStruct((1, 2, 2, 2), jnp.uint8),
    }
    memory = step.lower(abstract, batch).compile().memory_analysis()
    params = 4 * sum(leaf.size for leaf in jax.tree.leaves(abstract.params))
    assert memory.alias_size_in_bytes > (3 + bool(ema_decay)) * params
    assert memory.temp_size_in_bytes < 2.5 * params  # the gradient, in two layouts


def three_features(x):
    return jnp.concatenate([x, x**2, jnp.sin(9 * x)], axis=-1)


class Bare(nnx.Module):
    """A network whose last layer has the name `head`."""

    def __init__(self, head):
        self.head = head

    def __call__(self, x, *, rngs=None):
        return self.head(three_features(x))


class Headed(Bare):
    def features(self, x, *, rngs=None):
        return three_features(x)


HEADS = {
    "convolution": lambda rngs: Conv(3, 4, kernel_size=1, use_bias=True, rngs=rngs),
    "without a bias": lambda rngs: Conv(3, 4, kernel_size=1, rngs=rngs),
    "of 27 voxels": lambda rngs: Conv(3, 4, kernel_size=3, use_bias=True, rngs=rngs),
    "linear": lambda rngs: nnx.Linear(3, 4, rngs=rngs),
    "function": lambda rngs: lambda y: jnp.concatenate([y, y[..., :1] ** 3], axis=-1),
}


@pytest.mark.parametrize("name", HEADS)
@pytest.mark.parametrize("kind", [Bare, Headed])
def test_any_last_layer_is_trained_on(rng, monkeypatch, name, kind):
    monkeypatch.setattr(by_platform, "ENTRIES_ON_CPU", 1)  # a plane at a time
    model = kind(HEADS[name](nnx.Rngs(0)))
    batch = random_batch(rng, batch=2, side=8, classes=4)
    run = functools.partial(loss_and_accuracy_counts, model, loss=LOSS)
    loss, hits = run(batch["image"], batch["label"])
    logits = np.asarray(model(batch["image"]))
    expected = LOSS(logits, batch["label"])
    assert float(loss) == pytest.approx(float(expected), rel=1e-5)
    guess, label = (a[:, ::4, ::4, ::4] for a in (logits.argmax(-1), batch["label"]))
    right = ((guess == label) & (label > 0)).sum()
    assert hits.tolist() == [right, (label > 0).sum()]
    program = str(jax.make_jaxpr(run)(batch["image"], batch["label"]))
    in_blocks = kind is Headed and name == "convolution"
    assert ("f32[2,8,8,8,4]" in program) != in_blocks  # the logits


def test_dropout_depends_on_seed_and_step_alone(start, rng):
    batch = random_batch(rng, batch=2, side=8, classes=4)

    def losses_at(steps, seed):
        step, state, *_ = start(dropout=0.5, seed=seed)
        for at in steps:
            copy = jax.tree.map(jnp.array, state)  # since the step donates it
            copy = dataclasses.replace(copy, step=jnp.int32(at))
            yield float(step(copy, batch)[1]["loss"])

    first, other, again = losses_at((3, 4, 3), seed=0)
    (reseeded,) = losses_at((3,), seed=1)
    assert first == again
    assert len({first, other, reseeded}) == 3


@pytest.mark.parametrize("data", [1, 2])
def test_accumulated_gradients_are_those_of_the_batch(start, rng, data):
    batch = random_batch(rng, batch=8, side=8, classes=4)
    results = []
    for parts in (1, 4):
        step, state, *_, mesh = start(data=data, options={"accumulate": parts})
        state, metrics = step(state, sharding.place_batch(batch, mesh))
        results.append((state.opt_state, metrics))
    whole, parted = (jax.tree.map(np.asarray, result) for result in results)
    close = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-7)
    jax.tree.map(close, parted, whole)


def test_the_average_follows_the_parameters(start, rng):
    step, state, *_ = start(learning_rate=0.05, options={"ema_decay": 0.3})
    batch = random_batch(rng, batch=2, side=8, classes=4)
    average = np.asarray(state.params["stem"]["kernel"])
    for t in range(5):
        state, _ = step(state, batch)
        decay = min(0.3, (1 + t) / (10 + t))
        kernel = np.asarray(state.params["stem"]["kernel"])
        average = decay * average + (1 - decay) * kernel
    np.testing.assert_allclose(state.ema_params["stem"]["kernel"], average, rtol=1e-5)
    assert state.evaluated_params is state.ema_params


def test_a_step_that_is_not_finite_is_left_out(start, rng):
    step, state, *_ = start(learning_rate=0.05, options={"ema_decay": 0.3})
    good = random_batch(rng, batch=2, side=8, classes=4)
    bad = good | {"image": np.full_like(good["image"], np.nan)}
    state, _ = step(state, good)
    before = jax.tree.map(np.asarray, state)
    for in_row in (1, 2):
        state, metrics = step(state, bad)
        assert np.isnan(metrics["loss"]) and metrics["skipped_in_row"] == in_row
    for part in ("params", "opt_state", "ema_params"):
        jax.tree.map(
            np.testing.assert_array_equal, getattr(state, part), getattr(before, part)
        )
    assert int(state.step) == 3
    state, metrics = step(state, good)
    assert metrics["skipped"] == 2 and metrics["skipped_in_row"] == 0
    assert (state.params["stem"]["kernel"] != before.params["stem"]["kernel"]).any()


def test_prediction_has_no_dropout(start, rng):
    _, state, abstract, graphdef, mesh = start(data=2, dropout=0.9)
    predict = make_predict(graphdef, abstract=abstract, mesh=mesh)
    x = rng.random((2, 8, 8, 8, 1), np.float32)
    logits = predict(state.params, x)
    assert logits.shape == (2, 8, 8, 8, 4)
    np.testing.assert_array_equal(logits, predict(state.params, x))


SMALL_SMT = SwinSMTConfig(
    *(1, 5, 12),
    num_experts=4,
    num_moe_stages=3,
    window_size=4,
    depths=(1, 1, 1, 1),
)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "side", "mesh", "loss"),
    [
        ("swin_smt", 32, (4, 2), "dice_ce"),
        ("dints", 16, (8, 1), "dice_ce"),
        ("repux_net", 32, (8, 1), "dice_ce"),
        ("universal_model", 32, (8, 1), "one_vs_all"),
    ],
)
def test_eight_devices_learn_as_one(rng, name, side, mesh, loss):
    entry = registry.entry(name)
    model = SMALL_SMT if name == "swin_smt" else entry.config(1, 5, **entry.tiny)
    config = OptimizerConfig(1e-2, warmup_steps=2)
    batches = [random_batch(rng, batch=8, side=side, classes=5) for _ in range(5)]
    seed = rng.integers(1 << 30)
    curves = []
    for data, expert in (mesh, (1, 1)):
        mesh = sharding.make_mesh(MeshConfig(data, expert))
        step, abstract, *_ = prepare(model, config, mesh=mesh, loss=losses.make(loss))
        state = random_state(abstract, np.random.default_rng(seed))
        curve = []
        for batch in batches:
            state, metrics = step(state, sharding.place_batch(batch, mesh))
            curve.append(float(metrics["loss"]))
        curves.append(curve)
    assert curves[1][-1] < curves[1][0] - 0.05
    np.testing.assert_allclose(curves[0][:2], curves[1][:2], rtol=0, atol=1e-4)
    # Adam enlarges what rounding leaves of the gradient of a bias before a batch norm.
    most = 5e-3 if name == "repux_net" else 1e-4
    np.testing.assert_allclose(curves[0], curves[1], rtol=0, atol=most)


@pytest.mark.parametrize(
    "routing", [pytest.param("dense", marks=pytest.mark.slow), "streaming"]
)
def test_every_part_of_the_step_has_its_name(routing):
    small = {"window_size": 4, "depths": (1, 1, 1, 1), "routing": routing}
    model = SwinSMTConfig(1, 5, 12, num_experts=2, num_moe_stages=3, **small)
    mesh = sharding.make_mesh(MeshConfig(1, 1))
    step, abstract, *_ = prepare(model, OptimizerConfig(1e-2), mesh=mesh)
    batch = {
        "image": jax.ShapeDtypeStruct((1, 32, 32, 32, 1), jnp.float32),
        "label": jax.ShapeDtypeStruct((1, 32, 32, 32), jnp.uint8),
    }
    said = step.lower(abstract, batch).as_text(debug_info=True)
    in_block = "stage{}.*block0.*soft_moe.*{}"
    names = ["patch_embed", "stage1.*block0.*attention", "stage1.*block0.*mlp"]
    names += [f"decoder{level}" for level in range(1, 6)]
    names += ["head", "loss", "optimizer", *(f"stage{i}.*merge" for i in range(1, 5))]
    for part in ("routing", "dispatch", "combine", "experts"):
        names += [in_block.format(stage, part) for stage in (2, 3, 4)]
    for direction in ("jvp", "transpose"):
        names += [rf"{direction}\(.*stage4.*experts", rf"{direction}\(.*decoder1"]
    for name in names:
        assert re.search(name, said), name


@pytest.mark.parametrize(
    "name, data, expert",
    [
        ("swin_smt_paper", 2, 4),
        *(
            pytest.param(name, 8, 1, marks=pytest.mark.slow)
            for name in (
                "swin_smt_paper",
                "unest",
                "dints",
                "repux_net",
                "universal_model",
            )
        ),
    ],
)
def test_the_step_of_a_config_lowers_for_gpu_and_tpu(name, data, expert):
    module = importlib.import_module(f"swinsmt_jax.configs.{name}")
    config = from_config_dict(module.get_config())
    mesh = sharding.make_mesh(MeshConfig(data, expert))
    sharding.require_divisible(mesh, batch_size=config.data.batch_size)
    loss = losses.make(config.training.loss)
    step, abstract, *_ = prepare(config.model, config.optimizer, mesh=mesh, loss=loss)
    shape = (config.data.batch_size, *config.data.patch_shape)
    place = sharding.batch_sharding(mesh)
    batch = {
        "image": jax.ShapeDtypeStruct((*shape, 1), jnp.float32, sharding=place),
        "label": jax.ShapeDtypeStruct(shape, jnp.uint8, sharding=place),
    }
    exported = jax.export.export(step, platforms=("cuda", "tpu"))(abstract, batch)
    assert exported.platforms == ("cuda", "tpu") and exported.nr_devices == 8
    leaves = len(jax.tree.leaves(abstract)) + 6  # the new state and six metrics
    assert len(exported.out_avals) == leaves
