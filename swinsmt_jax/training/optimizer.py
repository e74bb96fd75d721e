"""AdamW with clipping by the global norm, linear warm-up and cosine decay."""

import re
from collections.abc import Callable, Hashable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from swinsmt_jax import checks
from swinsmt_jax.config import OptimizerConfig
from swinsmt_jax.sharding import path_name

DECAYED = r"(kernel|w1|w2)$"


class Optimizer(NamedTuple):
    """An `optax.GradientTransformation` that says which parameters it treats alike.

    Attributes:
        init, update: as optax's.
        kind: of a parameter's path. Parameters of one kind are updated each element by
            itself, in the same way.
    """

    init: optax.TransformInitFn
    update: optax.TransformUpdateFn
    kind: Callable[[str], Hashable]


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

    Biases, scales of norms, embeddings of positions and slots, and tables of relative
    positions are left out, as in the Swin transformer's own recipe (Liu et al. 2021).
    """
    return re.search(DECAYED, name) is not None


def make_optimizer(config: OptimizerConfig, schedule: optax.Schedule) -> Optimizer:
    """Return AdamW with decoupled weight decay on the kernels (Loshchilov 2019).

    Frozen parameters take no part in the norm by which gradients are clipped.
    """

    def decayed(params):
        return jax.tree_util.tree_map_with_path(
            lambda path, _: is_decayed(path_name(path)), params
        )

    def scaled_by(factor):
        def scale(updates, params):
            return jax.tree_util.tree_map_with_path(
                lambda path, a: a * factor(path_name(path)), updates
            )

        return optax.stateless(scale)

    def learning(name):
        return float(not any(re.search(p, name) for p in config.freeze))

    def rate(name):
        return learning(name) * config.layer_decay ** stages_from_decoder(name)

    adamw = optax.chain(
        optax.clip_by_global_norm(config.clip_norm),
        optax.adamw(
            schedule,
            b1=config.b1,
            b2=config.b2,
            weight_decay=config.weight_decay,
            mask=decayed,
        ),
    )
    whole = adamw
    if config.freeze or config.layer_decay != 1:
        whole = optax.chain(scaled_by(learning), adamw, scaled_by(rate))
    return Optimizer(*whole, kind=lambda name: (is_decayed(name), rate(name)))


def stages_from_decoder(name: str) -> int:
    """Return how many stages of the encoder a parameter is away from the decoder.

    1 for the last stage (swinViT/layers4), 5 for the patch embedding, 0 for the rest.
    """
    found = re.search(r"swinViT/(?:layers(\d)|patch_embed)", name)
    return 0 if found is None else 5 - int(found[1] or 0)


def require_stages(config: OptimizerConfig, params: dict) -> None:
    """Raise `UserError` for a `layer_decay` that no parameter would feel."""
    leaves = jax.tree_util.tree_flatten_with_path(params)[0]
    stages = [stages_from_decoder(path_name(path)) for path, _ in leaves]
    checks.require(
        config.layer_decay == 1 or any(stages),
        f"optimizer.layer_decay is {config.layer_decay}, but this network has no "
        "stages of a Swin encoder (swinViT/layers1 to 4), on which alone it acts; "
        "leave it at 1.",
    )


def require_frozen(config: OptimizerConfig, params: dict) -> None:
    """Raise `UserError` for a pattern of `freeze` that no parameter's path matches."""
    leaves = jax.tree_util.tree_flatten_with_path(params)[0]
    names = [path_name(path) for path, _ in leaves]
    for pattern in config.freeze:
        checks.require(
            any(re.search(pattern, name) for name in names),
            f"optimizer.freeze holds {pattern!r}, which matches no parameter; their "
            f"paths are such as {', '.join(names[:: max(1, len(names) // 4)][:4])}.",
        )
    checks.require(
        not all(any(re.search(p, n) for p in config.freeze) for n in names),
        f"optimizer.freeze = {config.freeze} freezes all parameters; nothing is left "
        "to learn.",
    )
