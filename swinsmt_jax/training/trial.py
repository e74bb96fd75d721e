"""Measure a training step on one device of this machine, without data."""

import os
import statistics
import time
from dataclasses import dataclass, replace

import jax
import numpy as np

from swinsmt_jax import sharding
from swinsmt_jax.config import ExperimentConfig
from swinsmt_jax.runtime import cost, memory
from swinsmt_jax.training import losses, remat, setup

STEPS = 3  # that are timed


@dataclass(frozen=True)
class Trial:
    """The cost of one training step, compiled and taken.

    Attributes:
        cost: operations and memory.
        device: name of the device.
        compilation: seconds.
        seconds: of a step, the median of `STEPS` without reading data.
    """

    cost: cost.Cost
    device: str
    compilation: float
    seconds: float

    def __str__(self) -> str:
        """State the cost of a step on this machine."""
        return (
            f"{self.cost}; {self.seconds:.3g} s, and {self.compilation:.0f} s to "
            f"compile ({self.device})"
        )


def take(config: ExperimentConfig) -> Trial:
    """Compile the training step of a config and take it on random crops.

    Raises:
        UserError: for a step that does not fit into the device's memory, with advice.
    """
    mesh = sharding.make_mesh(replace(config.mesh, data=1, expert=1))
    model, data, training = config.model, config.data, config.training
    abstract, start, step_of, _ = setup.make_network(
        model, config.optimizer, training, mesh=mesh
    )
    batch = _random_batch(config)
    placed = sharding.place_batch(batch, mesh)
    what_helps = memory.what_helps(
        model, data, accumulate=training.accumulate, devices=1, expert=1
    )
    with memory.remedies(what_helps):
        begin = time.perf_counter()
        program, found, _ = remat.compile_step(
            *(step_of, abstract, placed),
            model=model,
            data=data,
            loss=losses.make(training.loss),
            accumulate=training.accumulate,
            deterministic=training.deterministic,
            mesh=mesh,
        )
        compilation = time.perf_counter() - begin
        cost.require_fit(found)
        state, seconds = start(None), []
        for _ in range(1 + STEPS):
            begin = time.perf_counter()
            state, metrics = program(state, placed)
            jax.block_until_ready(metrics)
            seconds.append(time.perf_counter() - begin)
    device = mesh.devices.flat[0]
    cores = f", {os.cpu_count()} cores" if device.platform == "cpu" else ""
    name, typical = f"{device.device_kind}{cores}", statistics.median(seconds[1:])
    return Trial(found, name, compilation, typical)


def _random_batch(config):
    shape = (config.data.batch_size, *config.data.patch_shape)
    rng, classes = np.random.default_rng(0), config.model.out_channels
    return {
        "image": rng.random((*shape, config.model.in_channels), np.float32),
        "label": rng.integers(0, classes, shape, np.uint8),
    }
