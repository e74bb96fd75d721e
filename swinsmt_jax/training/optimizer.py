"""AdamW with clipping by the global norm, linear warm-up and cosine decay."""

import re
from collections.abc import Callable, Hashable
from typing import NamedTuple

import jax
import numpy as np
import optax

from swinsmt_jax import checks
from swinsmt_jax.config import OptimizerConfig
from swinsmt_jax.models.registry import NetworkConfig
from swinsmt_jax.sharding import path_name
from swinsmt_jax.training.prior import around


class Optimizer(NamedTuple):
    """An `optax.GradientTransformation` that tells which parameters it treats alike.

    Attributes:
        init, update: as optax's.
        kind: from a parameter's path to its kind. All elements of parameters of one
            kind are updated separately, in the same way.
    """

    init: optax.TransformInitFn
    update: optax.TransformUpdateFn
    kind: Callable[[str], Hashable]


def make_schedule(config: OptimizerConfig, *, num_steps: int) -> optax.Schedule:
    """Return the learning rate as a function of the step, counted from 0.

    It rises linearly to `learning_rate` over `warmup_steps`, and falls along a half
    cosine to `final_ratio * learning_rate` at `num_steps`. The first step has a rate
    above 0, unlike in `optax.warmup_cosine_decay_schedule`. In an extended run it ends
    at `config.spans`, and then stays constant or begins again.
    """
    ends = [end for end in config.spans if end < num_steps]
    if config.extend == "constant" and ends:
        return _one_schedule(config, num_steps=ends[0])
    lengths = np.diff([0, *ends, num_steps])
    parts = [_one_schedule(config, num_steps=int(n)) for n in lengths]
    return optax.join_schedules(parts, ends)


def _one_schedule(config, *, num_steps):
    highest, warmup = config.learning_rate, config.warmup_steps
    rise = optax.linear_schedule(highest / max(1, warmup), highest, max(1, warmup - 1))
    fall = optax.cosine_decay_schedule(
        highest, max(1, num_steps - warmup), alpha=config.final_ratio
    )
    return optax.join_schedules([rise, fall], [warmup])


def make_optimizer(
    config: OptimizerConfig, schedule: optax.Schedule, *, network: NetworkConfig
) -> Optimizer:
    """Return AdamW with decoupled weight decay on the kernels (Loshchilov 2019).

    Frozen parameters do not count in the norm that clips gradients. `network` tells
    which parameters decay, the encoder stage of each parameter, and its prior.
    """

    def learns(path):
        return not any(re.search(pattern, path) for pattern in config.freeze)

    def rate(path):
        return learns(path) * config.layer_decay ** network.layer_decay_stage(path)

    adamw = optax.chain(
        optax.clip_by_global_norm(config.clip_norm),
        optax.adamw(
            schedule,
            b1=config.b1,
            b2=config.b2,
            weight_decay=config.weight_decay,
            mask=lambda params: _map_paths(
                lambda path, _: network.is_decayed(path), params
            ),
        ),
    )
    prior = network.prior
    if prior is not None:
        adamw = around(adamw, prior)
    if config.freeze or config.layer_decay != 1:
        # Not by optax.partition or masked, whose states checkpoints do not have.
        adamw = optax.chain(_scaled_by(learns), adamw, _scaled_by(rate))
    init, update = adamw

    def kind(path):
        alone = path if prior is not None and prior.acts_on(path) else ""
        return network.is_decayed(path), rate(path), alone

    return Optimizer(init, update, kind)


def _scaled_by(factor):
    def scale(updates, params):
        return _map_paths(lambda path, a: a * float(factor(path)), updates)

    return optax.stateless(scale)


def _map_paths(function, tree):
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: function(path_name(path), leaf), tree
    )


def require_effect(config: OptimizerConfig, params: dict) -> None:
    """Raise `UserError` if a pattern of `freeze` matches no parameter, or all."""
    leaves = jax.tree_util.tree_flatten_with_path(params)[0]
    paths = [path_name(path) for path, _ in leaves]
    for pattern in config.freeze:
        checks.require(
            any(re.search(pattern, path) for path in paths),
            f"optimizer.freeze holds {pattern!r}, which matches no parameter; their "
            f"paths are such as {', '.join(paths[:: max(1, len(paths) // 4)][:4])}.",
        )
    checks.require(
        not all(any(re.search(p, path) for p in config.freeze) for path in paths),
        f"optimizer.freeze = {config.freeze} freezes all parameters; nothing is left "
        "to learn.",
    )
