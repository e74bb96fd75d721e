import jax
import jax.numpy as jnp
import numpy as np
import pytest

from swinsmt_jax import losses, sharding
from swinsmt_jax.config import (
    MeshConfig,
    OptimizerConfig,
    SwinSMTConfig,
    from_config_dict,
)
from swinsmt_jax.training.optimizer import make_optimizer, make_schedule
from swinsmt_jax.training.state import (
    TrainState,
    blueprint,
    initialize,
    shardings_of,
)
from swinsmt_jax.training.step import make_predict, make_train_step


def prepare(model, optimizer_config, *, mesh, num_steps=10, seed=0):
    """Everything but the parameters: (step, state's blueprint, optimizer, graphdef)."""
    schedule = make_schedule(optimizer_config, num_steps=num_steps)
    optimizer = make_optimizer(optimizer_config, schedule)
    graphdef, like = blueprint(model, optimizer, mesh=mesh)
    step = make_train_step(
        graphdef,
        optimizer,
        schedule=schedule,
        loss_fn=losses.dice_cross_entropy,
        seed=seed,
        like=like,
        mesh=mesh,
    )
    return step, like, optimizer, graphdef


def random_batch(rng, *, batch, side, classes):
    image = rng.random((batch, side, side, side, 1), np.float32)
    label = (image[..., 0] * classes).astype(np.uint8)
    return {"image": image, "label": label, "case": np.zeros(batch, np.int32)}


def random_state(like, rng):
    """Parameters as after initialisation, without compiling that."""

    def draw(leaf):
        if leaf.ndim == 1:  # scales and biases
            return rng.uniform(0.5, 1, leaf.shape).astype(np.float32)
        bound = np.prod(leaf.shape[:-1]) ** -0.5
        return rng.uniform(-bound, bound, leaf.shape).astype(np.float32)

    params = jax.tree.map(draw, like.params)
    zeros = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), like)
    state = TrainState(zeros.step, params, zeros.opt_state)
    return jax.device_put(state, shardings_of(like))


@pytest.fixture
def start(tiny, make_config):
    """Make a step, a state and its blueprint for the tiny network."""

    def make(*, data=1, expert=1, dropout=0.0, seed=0, **optimizer):
        config = make_config(model={"dropout": dropout}, optimizer=optimizer)
        mesh = sharding.make_mesh(MeshConfig(data, expert))
        step, like, optimizer, graphdef = prepare(
            config.model, config.optimizer, mesh=mesh, seed=seed
        )
        state = initialize(config.model, optimizer, seed=0, like=like)
        return step, state, like, graphdef, mesh

    return make


def test_steps_lower_the_loss_and_count(start, rng):
    step, state, *_ = start(learning_rate=0.05, warmup_steps=2)
    batch = random_batch(rng, batch=2, side=8, classes=4)
    losses, rates = [], []
    for _ in range(10):
        state, metrics = step(state, batch)
        losses.append(float(metrics["loss"]))
        rates.append(float(metrics["learning_rate"]))
    assert losses[-1] < 0.8 * losses[0] and int(state.step) == 10
    assert rates[:2] == pytest.approx([0.025, 0.05]) and rates[-1] < 0.01
    assert float(metrics["grad_norm"]) > 0


def test_the_state_is_donated_and_stays_where_it_was(start, rng):
    step, state, like, *_ = start(data=2, expert=2)
    batch = random_batch(rng, batch=4, side=8, classes=4)
    new, _ = step(state, batch)
    assert state.params["stem"]["kernel"].is_deleted()
    equal = jax.tree.map(lambda a, b: a.sharding == b.sharding, new, like)
    assert all(jax.tree.leaves(equal))


def test_dropout_depends_on_seed_and_step_alone(start, rng):
    batch = random_batch(rng, batch=2, side=8, classes=4)

    def losses_at(steps, seed):
        step, state, *_ = start(dropout=0.5, seed=seed)
        for at in steps:
            copy = jax.tree.map(jnp.array, state)  # since the step donates it
            copy = TrainState(jnp.int32(at), copy.params, copy.opt_state)
            yield float(step(copy, batch)[1]["loss"])

    first, other, again = losses_at((3, 4, 3), seed=0)
    (reseeded,) = losses_at((3,), seed=1)
    assert first == again
    assert len({first, other, reseeded}) == 3


def test_prediction_has_no_dropout(start, rng):
    _, state, like, graphdef, mesh = start(data=2, dropout=0.9)
    predict = make_predict(graphdef, like=like, mesh=mesh)
    x = rng.random((2, 8, 8, 8, 1), np.float32)
    logits = predict(state.params, x)
    assert logits.shape == (2, 8, 8, 8, 4)
    np.testing.assert_array_equal(logits, predict(state.params, x))


def test_eight_devices_learn_as_one(rng):
    small = {"window_size": 4, "depths": (1, 1, 1, 1)}
    model = SwinSMTConfig(1, 5, 12, num_experts=4, num_moe_stages=3, **small)
    config = OptimizerConfig(1e-2, warmup_steps=2)
    batches = [random_batch(rng, batch=8, side=32, classes=5) for _ in range(5)]
    seed = rng.integers(1 << 30)
    curves = []
    for data, expert in ((4, 2), (1, 1)):
        mesh = sharding.make_mesh(MeshConfig(data, expert))
        step, like, *_ = prepare(model, config, mesh=mesh)
        state = random_state(like, np.random.default_rng(seed))
        curve = []
        for batch in batches:
            state, metrics = step(state, sharding.place_batch(batch, mesh))
            curve.append(float(metrics["loss"]))
        curves.append(curve)
    assert curves[1][-1] < curves[1][0] - 0.1
    np.testing.assert_allclose(curves[0], curves[1], rtol=0, atol=1e-4)


@pytest.mark.parametrize("data, expert", [(8, 1), (2, 4)])
def test_the_papers_step_lowers_for_gpu_and_tpu(data, expert):
    from configs import swin_smt_paper

    config = from_config_dict(swin_smt_paper.get_config())
    mesh = sharding.make_mesh(MeshConfig(data, expert))
    sharding.require_divisible(config, mesh)
    step, like, *_ = prepare(config.model, config.optimizer, mesh=mesh)
    shape = (config.data.batch_size, *config.data.patch_shape)
    place = sharding.batch_sharding(mesh)
    batch = {
        "image": jax.ShapeDtypeStruct((*shape, 1), jnp.float32, sharding=place),
        "label": jax.ShapeDtypeStruct(shape, jnp.uint8, sharding=place),
    }
    exported = jax.export.export(step, platforms=("cuda", "tpu"))(like, batch)
    assert exported.platforms == ("cuda", "tpu") and exported.nr_devices == 8
    leaves = len(jax.tree.leaves(like)) + 3  # the new state and three metrics
    assert len(exported.out_avals) == leaves
