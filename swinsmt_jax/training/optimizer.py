"""AdamW with clipping by the global norm, linear warm-up and cosine decay."""

import re

import jax
import jax.numpy as jnp
import optax

from swinsmt_jax.config import OptimizerConfig
from swinsmt_jax.sharding import path_name

NOT_DECAYED = r"(bias|scale|gamma|b1|b2|relative_position_bias_table)$"


def make_schedule(config: OptimizerConfig, *, num_steps: int) -> optax.Schedule:
    """Return the learning rate as a function of the step, counted from 0.

    It rises linearly to `learning_rate` over `warmup_steps`, beginning above 0, and
    falls along a half cosine to `final_ratio * learning_rate` at `num_steps`.
    """
    warmup = config.warmup_steps

    def schedule(step):
        rise = jnp.minimum(1.0, (step + 1) / max(1, warmup))
        progress = jnp.clip((step - warmup) / max(1, num_steps - warmup), 0.0, 1.0)
        fall = 0.5 * (1 + jnp.cos(jnp.pi * progress))
        ratio = config.final_ratio + (1 - config.final_ratio) * fall
        return config.learning_rate * rise * ratio

    return schedule


def is_decayed(name: str) -> bool:
    """Whether weight decay acts on a parameter: on kernels alone.

    Biases, scales of norms and tables of relative positions are left out, as in the
    Swin transformer's own recipe (Liu et al. 2021).
    """
    return re.search(NOT_DECAYED, name) is None


def make_optimizer(
    config: OptimizerConfig, schedule: optax.Schedule
) -> optax.GradientTransformation:
    """Return AdamW with decoupled weight decay on the kernels (Loshchilov 2019)."""

    def decayed(params):
        return jax.tree_util.tree_map_with_path(
            lambda path, _: is_decayed(path_name(path)), params
        )

    return optax.chain(
        optax.clip_by_global_norm(config.clip_norm),
        optax.adamw(
            schedule,
            b1=config.b1,
            b2=config.b2,
            weight_decay=config.weight_decay,
            mask=decayed,
        ),
    )
