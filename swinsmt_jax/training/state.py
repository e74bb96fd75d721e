"""The training state between steps, as one pytree of arrays."""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import optax
from absl import logging
from flax import nnx
from jax.sharding import Mesh

from swinsmt_jax import models, sharding
from swinsmt_jax.models.registry import NetworkConfig
from swinsmt_jax.runtime import processes


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class TrainState:
    """State after `step` updates.

    Attributes:
        step: int32; it and the seed decide the keys and data of the next update.
        params: nested dictionaries of float32 arrays, named as the network's parts.
        buffers: the network's arrays without gradients, such as the running statistics
            of batch norm, nested alike; may be empty.
        opt_state: optax's state; its moments are nested as `params`.
        ema_params: running average of `params` and `buffers`; empty if not kept.
        skipped: int32 [2], steps left out because they were not finite: in total, and
            the latest in a row.
    """

    step: jax.Array
    params: dict
    buffers: dict
    opt_state: optax.OptState
    ema_params: dict
    skipped: jax.Array

    @property
    def arrays(self) -> dict:
        """The arrays of the network: parameters and buffers."""
        return models.merge_buffers(self.params, self.buffers)

    @property
    def evaluated_params(self) -> dict:
        """The arrays to validate and evaluate: the average, if kept."""
        return self.ema_params or self.arrays


def abstract_state(
    config: NetworkConfig,
    optimizer: optax.GradientTransformation,
    *,
    mesh: Mesh,
    averaged: bool = False,
) -> tuple[nnx.GraphDef, TrainState]:
    """Return the network's structure and its future state as shapes with shardings.

    This takes no memory. The leaves are `jax.ShapeDtypeStruct` with dtype and sharding,
    from which a state is made, restored and compiled. `averaged` adds the running
    average of the parameters.
    """
    graphdef, arrays = models.abstract_model(config)
    state = jax.eval_shape(lambda a: _start(graphdef, a, optimizer, averaged), arrays)
    rules = sharding.parameter_rules(config)
    shardings = sharding.tree_shardings(state, mesh=mesh, rules=rules)
    return graphdef, jax.tree.map(
        lambda leaf, place: leaf.update(sharding=place), state, shardings
    )


def initialize(
    config: NetworkConfig,
    optimizer: optax.GradientTransformation,
    *,
    seed: int,
    abstract: TrainState,
) -> TrainState:
    """Make the state before the first update, directly on the devices of `abstract`."""

    def make(key):
        parts = models.split(models.create(config, rngs=nnx.Rngs(key)))
        return _start(*parts, optimizer, bool(abstract.ema_params))

    make = jax.jit(make, out_shardings=shardings_of(abstract))
    return make(jax.random.key(seed))


def changed(
    state: TrainState, graphdef: nnx.GraphDef, change: Callable[[nnx.Module], object]
) -> TrainState:
    """Return the state after `change` has set parameters and buffers of its network.

    The result of `change` is logged. All processes call it.
    """
    model = nnx.merge(graphdef, jax.tree.map(jnp.asarray, state.arrays))
    for line in str(processes.run_on_all(lambda: change(model))).splitlines():
        logging.info("%s", line)
    arrays = jax.device_put(models.split(model)[1], shardings_of(state.arrays))
    ema_params = jax.tree.map(jnp.copy, arrays) if state.ema_params else {}
    params, buffers = models.split_buffers(graphdef, arrays)
    return dataclasses.replace(
        state, params=params, buffers=buffers, ema_params=ema_params
    )


def shardings_of(tree: Any) -> Any:
    """Return the shardings of a tree's leaves."""
    return jax.tree.map(lambda leaf: leaf.sharding, tree)


def _start(graphdef, arrays, optimizer, averaged):
    params, buffers = models.split_buffers(graphdef, arrays)
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        buffers=buffers,
        opt_state=optimizer.init(params),
        ema_params=jax.tree.map(jnp.copy, arrays) if averaged else {},
        skipped=jnp.zeros(2, jnp.int32),
    )
