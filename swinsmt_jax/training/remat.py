"""`model.remat="auto"`: a step recomputes as few parts as memory allows.

Candidates follow the order of the network's `remat_parts`: none, the first, the first
two and so on. Tracing finds the arrays that the forward pass keeps for the backward
pass, and these predict its memory. Then the compiled step is measured. If it does not
fit, the next candidate is compiled.
"""

import functools
import math
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import jax
from absl import logging
from flax import nnx
from jax.sharding import Mesh

from swinsmt_jax.config import DataConfig
from swinsmt_jax.models import abstract_model
from swinsmt_jax.models.registry import AUTO, NetworkConfig
from swinsmt_jax.runtime import cost, processes
from swinsmt_jax.runtime.memory import gigabytes
from swinsmt_jax.training.losses import Loss
from swinsmt_jax.training.step import attention_of, loss_and_accuracy_counts

AT_WORK = 0.35  # of what is kept without remat: what a backward pass holds besides
SHARE = 0.9  # of a device that the prediction may fill


@dataclass(frozen=True)
class Choice:
    """The choice of parts that a step recomputes.

    Attributes:
        parts: of the network.
        predicted: bytes of the step on one device.
        compiled: bytes that the compiler states.
        limit: bytes of a device; if None (unknown), all parts are recomputed.
    """

    parts: tuple[str, ...]
    predicted: int
    compiled: int
    limit: int | None

    def __str__(self) -> str:
        """State what is recomputed and why."""
        limit = "unknown" if self.limit is None else gigabytes(self.limit)
        return (
            f"{', '.join(self.parts) or 'nothing'} is recomputed in the backward pass: "
            f"the step was predicted to need {gigabytes(self.predicted)}, needs "
            f"{gigabytes(self.compiled)} as compiled, and the memory of a device is "
            f"{limit}"
        )


def candidates(model: NetworkConfig) -> list[NetworkConfig]:
    """Return the configs to choose from, starting with the least recomputation."""
    if model.remat != AUTO:
        return [model]
    parts = model.remat_parts
    return [replace(model, remat=parts[:n]) for n in range(len(parts) + 1)]


def kept_bytes(
    model: NetworkConfig, batch: Any, *, loss: Loss, deterministic: bool = False
) -> int:
    """Count the bytes that a forward pass keeps for the backward pass.

    Args:
        model: of the network.
        batch: shapes of `image` [B, D, H, W, C] and `label` [B, D, H, W].
        loss: that is minimised.
        deterministic: as in the training step.

    Returns:
        The bytes without those of the parameters. Nothing is executed.
    """
    graphdef, params = abstract_model(model)

    def backward(params, image, label):
        def of(params):
            network = nnx.merge(graphdef, params)
            rngs = nnx.Rngs(dropout=0)
            return loss_and_accuracy_counts(
                network, image, label, loss=loss, rngs=rngs
            )[0]

        return jax.vjp(of, params)[1]

    with attention_of(deterministic):
        kept = jax.eval_shape(backward, params, batch["image"], batch["label"])
    arrays = _arrays(kept) - _arrays(params)
    return sum(
        count * math.prod(shape) * dtype.itemsize
        for (shape, dtype), count in arrays.items()
    )


def predictor(
    model: NetworkConfig,
    state: Any,
    batch: Any,
    *,
    loss: Loss,
    accumulate: int = 1,
    deterministic: bool = False,
) -> Callable[[NetworkConfig], int]:
    """Return a function that predicts the memory of a step on one device.

    It takes one of the network's `candidates`, traces it and counts the bytes of state,
    batch, gradient, kept arrays and working memory.

    Args:
        model: with remat="auto".
        state, batch: arrays of the step or their shapes, with shardings.
        loss: that is minimised.
        accumulate: parts of a batch, processed one after the other.
        deterministic: as in the training step.
    """

    def of_a_part(array):
        count, *sides = array.sharding.shard_shape(array.shape)
        return jax.ShapeDtypeStruct((count // accumulate, *sides), array.dtype)

    part = {name: of_a_part(batch[name]) for name in ("image", "label")}
    options: dict[str, Any] = {"loss": loss, "deterministic": deterministic}
    kept = functools.cache(lambda network: kept_bytes(network, part, **options))
    without_remat = candidates(model)[0]
    always = _on_a_device((state, batch)) + _on_a_device(state.params)
    return lambda network: always + kept(network) + int(AT_WORK * kept(without_remat))


def compile_step(
    step_of: Callable[[NetworkConfig], jax.stages.Wrapped],
    state: Any,
    batch: Any,
    *,
    model: NetworkConfig,
    data: DataConfig,
    loss: Loss,
    accumulate: int,
    deterministic: bool,
    mesh: Mesh,
) -> tuple[jax.stages.Compiled, cost.Cost, Choice | None]:
    """Compile the training step; with remat="auto", the first one that fits.

    All processes call it and choose alike.

    Args:
        step_of: makes the step of a network's config.
        state, batch: arrays of the step or their shapes, with shardings.
        model, data, loss, accumulate, deterministic: of the experiment.
        mesh: of the step.

    Returns:
        The program, its cost, and the choice; None if the config makes it.
    """

    def compiled(network):
        program = processes.compiled(step_of(network), state, batch)
        return program, cost.measure(program, model=network, data=data, mesh=mesh)

    if model.remat != AUTO:
        return *compiled(model), None
    networks, limit = candidates(model), cost.device_memory(mesh)
    predict = predictor(
        *(model, state, batch),
        loss=loss,
        accumulate=accumulate,
        deterministic=deterministic,
    )
    first = len(networks) - 1
    if limit is not None:
        fitting = (n for n, m in enumerate(networks) if predict(m) <= SHARE * limit)
        first = next(fitting, first)
    for network in networks[max(processes.gather(first)) :]:
        program, found = compiled(network)
        choice = Choice(network.remat, predict(network), found.needed, limit)
        if network is networks[-1] or all(processes.gather(found.fits)):
            break
        if processes.is_first():
            logging.info("remat: %s; the next choice is compiled", choice)
    return program, found, choice


def _arrays(tree):
    """Count the arrays of each shape and dtype."""
    return Counter((leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(tree))


def _on_a_device(tree):
    """Count the bytes of arrays' shards."""
    return sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        for leaf in jax.tree.leaves(tree)
    )
