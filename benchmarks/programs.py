"""What the benchmarks compile and time: networks, their loss, the training step."""

import dataclasses
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from swinsmt_jax import sharding
from swinsmt_jax.config import ExperimentConfig
from swinsmt_jax.layers import recompute
from swinsmt_jax.models import abstract_model
from swinsmt_jax.models.registry import NetworkConfig
from swinsmt_jax.training import losses
from swinsmt_jax.training import state as train_state
from swinsmt_jax.training.optimizer import make_optimizer, make_schedule
from swinsmt_jax.training.step import loss_and_accuracy_counts, make_train_step

DICE_CE = losses.make("dice_ce")


def seconds_of(function: Callable, *arguments, repeats: int, warm: int = 1) -> list:
    """Return the seconds of each run, after some that are not counted."""
    seconds = []
    for _ in range(warm + repeats):
        start = time.perf_counter()
        jax.block_until_ready(function(*arguments))
        seconds.append(time.perf_counter() - start)
    return seconds[warm:]


def gigabytes(compiled: jax.stages.Compiled) -> float:
    """Return the memory of a compiled program's arguments and temporaries in GB."""
    memory = compiled.memory_analysis()
    return (memory.temp_size_in_bytes + memory.argument_size_in_bytes) / 1e9


def program(model: NetworkConfig, side: int, *, what: str, batch: int = 1):
    """Return a jitted function of (parameters, image, label), and their shapes.

    Args:
        model: config of the network.
        side: of the cubic patch, in voxels.
        what: "forward"; "gradient", of the training loss; "square", the gradient of
            the mean square of the logits.
        batch: patches.
    """
    graphdef, params = abstract_model(model)
    image = jax.ShapeDtypeStruct((batch, *(side,) * 3, model.in_channels), jnp.float32)
    label = jax.ShapeDtypeStruct(image.shape[:-1], jnp.uint8)

    def forward(params, image, label):
        return nnx.merge(graphdef, params)(image)

    def loss(params, image, label):
        network = nnx.merge(graphdef, params)
        return loss_and_accuracy_counts(network, image, label, loss=DICE_CE)[0]

    def square(params, image, label):
        return jnp.square(forward(params, image, label)).mean()

    function = {
        "forward": forward,
        "gradient": jax.value_and_grad(loss),
        "square": jax.value_and_grad(square),
    }[what]
    options = recompute.compiler_options(jax.default_backend())
    return jax.jit(function, compiler_options=options), (params, image, label)


def lower(model: NetworkConfig, side: int, *, what: str) -> jax.stages.Lowered:
    """Lower a `program`."""
    jitted, shapes = program(model, side, what=what)
    return jitted.lower(*shapes)


def zeros(shapes: tuple) -> tuple:
    """Return arguments of zeros for the shapes of a `program`."""
    return jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), shapes)


def seconds_within(lowered: jax.stages.Lowered, *, limit_gb: float, repeats: int = 1):
    """Return the compiled program and its fastest run; None if beyond the limit."""
    compiled = lowered.compile()
    output = compiled.memory_analysis().output_size_in_bytes / 1e9
    if gigabytes(compiled) + output > limit_gb:
        return compiled, None
    return compiled, min(
        seconds_of(compiled, *zeros(lowered.in_avals[0]), repeats=repeats)
    )


def with_all_recomputed(model: NetworkConfig) -> NetworkConfig:
    """Return the config with every part recomputed in the backward pass."""
    return dataclasses.replace(model, remat=model.remat_parts)


def training_step(config: ExperimentConfig, mesh: jax.sharding.Mesh):
    """Return the jitted training step, the state's shapes, and its initialisation."""
    schedule = make_schedule(config.optimizer, num_steps=config.training.num_steps)
    optimizer = make_optimizer(config.optimizer, schedule, network=config.model)
    graphdef, abstract = train_state.abstract_state(config.model, optimizer, mesh=mesh)
    step = make_train_step(
        graphdef,
        optimizer,
        loss=DICE_CE,
        schedule=schedule,
        seed=config.training.seed,
        abstract=abstract,
        mesh=mesh,
    )

    def start():
        return train_state.initialize(
            config.model, optimizer, seed=0, abstract=abstract
        )

    return step, abstract, start


def abstract_batch(shape: tuple[int, ...], mesh: jax.sharding.Mesh) -> dict:
    """Return shapes of a batch `[B, D, H, W]`, divided over a mesh."""
    place = sharding.batch_sharding(mesh)
    return {
        "image": jax.ShapeDtypeStruct((*shape, 1), jnp.float32, sharding=place),
        "label": jax.ShapeDtypeStruct(shape, jnp.uint8, sharding=place),
    }


def random_batch(shape: tuple[int, ...], mesh: jax.sharding.Mesh, *, classes: int):
    """Return a batch of uniform values and labels on a mesh."""
    rng = np.random.default_rng(0)
    batch = {
        "image": rng.random((*shape, 1), np.float32),
        "label": rng.integers(0, classes, shape, np.uint8),
    }
    return sharding.place_batch(batch, mesh)


def random_arguments(shapes: tuple) -> tuple:
    """Return small normal parameters, a uniform image and labels of zeros.

    They are drawn by numpy: compiling an initialisation takes longer than using it.
    """
    rng = np.random.default_rng(0)
    params, image, label = shapes
    params = jax.tree.map(
        lambda a: jnp.asarray(0.05 * rng.standard_normal(a.shape, np.float32)), params
    )
    image = jnp.asarray(rng.random(image.shape, np.float32))
    return params, image, jnp.zeros(label.shape, label.dtype)
