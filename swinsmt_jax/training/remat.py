"""`model.remat="auto"`: a step recomputes the fewest parts with which it fits.

The parts of a network are tried in the order of its `remat_parts`: none, the first,
the first two and so on. What a backward pass needs is predicted from the arrays that
the forward pass keeps for it, found by tracing alone. The compiled step is then
measured, and the next candidate is compiled where it does not fit.
"""

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
from swinsmt_jax.training.step import loss_and_accuracy_counts

AT_WORK = 0.35  # of what is kept without remat: what a backward pass holds besides
SHARE = 0.9  # of a device that the prediction may fill


@dataclass(frozen=True)
class Choice:
    """What a step recomputes.

    Attributes:
        parts: of the network.
        predicted: bytes of the step on one device.
        compiled: those that the compiler states.
        limit: bytes of a device; None if unknown, and then all parts are recomputed.
    """

    parts: tuple[str, ...]
    predicted: int
    compiled: int
    limit: int | None

    def __str__(self) -> str:
        """Say what is recomputed and why."""
        limit = "unknown" if self.limit is None else gigabytes(self.limit)
        return (
            f"{', '.join(self.parts) or 'nothing'} is recomputed in the backward pass: "
            f"the step was predicted to need {gigabytes(self.predicted)}, needs "
            f"{gigabytes(self.compiled)} as compiled, and the memory of a device is "
            f"{limit}"
        )


def candidates(model: NetworkConfig) -> list[NetworkConfig]:
    """Return the configs to choose from, that with the least recomputation first."""
    if model.remat != AUTO:
        return [model]
    parts = model.remat_parts
    return [replace(model, remat=parts[:n]) for n in range(len(parts) + 1)]


def kept_bytes(model: NetworkConfig, batch: Any, *, loss: Loss) -> int:
    """Count the bytes that a forward pass keeps for the backward pass.

    Args:
        model: of the network.
        batch: shapes of `image` [B, D, H, W, C] and `label` [B, D, H, W].
        loss: that is minimised.

    Returns:
        The bytes without those of the parameters. Nothing is computed.
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

    kept = jax.eval_shape(backward, params, batch["image"], batch["label"])
    arrays = _arrays(kept) - _arrays(params)
    return sum(
        count * math.prod(shape) * dtype.itemsize
        for (shape, dtype), count in arrays.items()
    )


def predicted_bytes(
    model: NetworkConfig, state: Any, batch: Any, *, loss: Loss, accumulate: int = 1
) -> list[int]:
    """Predict what each of a network's `candidates` needs on one device.

    Args:
        model: with remat="auto".
        state, batch: arrays of the step or their shapes, with shardings.
        loss: that is minimised.
        accumulate: parts of a batch, one after the other.

    Returns:
        The bytes of state, batch, gradient, what is kept and what is at work.
    """

    def of_a_part(array):
        count, *sides = array.sharding.shard_shape(array.shape)
        return jax.ShapeDtypeStruct((count // accumulate, *sides), array.dtype)

    part = {name: of_a_part(batch[name]) for name in ("image", "label")}
    kept = [kept_bytes(m, part, loss=loss) for m in candidates(model)]
    always = _on_a_device((state, batch)) + _on_a_device(state.params)
    return [always + own + int(AT_WORK * kept[0]) for own in kept]


def compile_step(
    step_of: Callable[[NetworkConfig], jax.stages.Wrapped],
    state: Any,
    batch: Any,
    *,
    model: NetworkConfig,
    data: DataConfig,
    loss: Loss,
    accumulate: int,
    mesh: Mesh,
) -> tuple[jax.stages.Compiled, cost.Cost, Choice | None]:
    """Compile the training step; with remat="auto", the first one that fits.

    Of several processes all call it, and choose alike.

    Args:
        step_of: makes the step of a network's config.
        state, batch: arrays of the step or their shapes, with shardings.
        model, data, loss, accumulate: of the experiment.
        mesh: of the step.

    Returns:
        The program, its cost, and what was chosen; None where the config says it.
    """
    limit, predicted = cost.device_memory(mesh), [0]
    networks = candidates(model)
    if model.remat == AUTO:
        predicted = predicted_bytes(
            model, state, batch, loss=loss, accumulate=accumulate
        )
    first = len(networks) - 1
    if limit is not None:
        fitting = [n for n, size in enumerate(predicted) if size <= SHARE * limit]
        first = min([*fitting, first])
    if len(networks) > 1:
        first = max(processes.gather(first))
    for network, size in list(zip(networks, predicted, strict=True))[first:]:
        program = processes.compiled(step_of(network), state, batch)
        found = cost.measure(program, model=network, data=data, mesh=mesh)
        choice = Choice(network.remat, size, found.needed, limit)
        if network is networks[-1] or all(processes.gather(found.fits)):
            break
        if processes.is_first():
            logging.info("remat: %s; the next choice is compiled", choice)
    return program, found, choice if model.remat == AUTO else None


def _arrays(tree):
    """Count the arrays of each shape and dtype."""
    return Counter((leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(tree))


def _on_a_device(tree):
    """Count the bytes of arrays' shards."""
    return sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        for leaf in jax.tree.leaves(tree)
    )
