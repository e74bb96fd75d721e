"""The network of one run, or of several as one: the mean of their probabilities."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from absl import logging

from swinsmt_jax import checks
from swinsmt_jax.class_map import ClassMap
from swinsmt_jax.config import ExperimentConfig
from swinsmt_jax.inference.grid import LARGEST, Decision
from swinsmt_jax.runtime.files import absolute

# What all networks of an ensemble must see of a scan alike.
ALIKE = ["patch_shape", "spacing", "orientation", "hu_range", "normalization"]
ALIKE += ["modality"]


def workdirs_of(given: str | Path | Sequence[str | Path]) -> list[Path]:
    """Return the workdirs that "A,B,C" or a list names; a folder may have commas."""
    if isinstance(given, str | Path):
        whole = absolute(given)
        given = [given] if whole.exists() else str(given).split(",")
    return [absolute(path) for path in given]


def load_networks(
    workdirs: Sequence[Path],
    *,
    step: int | str | None = None,
    load: Callable,
) -> tuple[ExperimentConfig, Any, dict]:
    """Read the networks of runs as one model, a pytree that maps windows to logits.

    Several networks return the logarithm of the mean of their probabilities, window by
    window. The first one decides the order of the classes.

    Args:
        workdirs: of the runs.
        step: of each, as in `checkpoint.load_model`.
        load: reads one, as `checkpoint.load_model`.

    Returns:
        The config of the first one, the model, and {"step": of the checkpoint, or of
        each of several, "metrics": of the first}.

    Raises:
        UserError: as `checkpoint.load_model`, and for networks that have other classes
            or see scans differently.
    """
    found = [load(workdir, step=step) for workdir in workdirs]
    (config, model, info), *others = found
    if not others:
        return config, model, info
    names = config.data.class_names
    orders = []
    for workdir, (other, _, _) in zip(workdirs, found, strict=True):
        for name in ALIKE:
            own, wanted = getattr(other.data, name), getattr(config.data, name)
            checks.require(
                own == wanted,
                f"{workdir} and {workdirs[0]} cannot be averaged, since their "
                f"data.{name} differ: {own} and {wanted}. Predict with each alone.",
            )
        checks.require(
            decision_of(other) == decision_of(config),
            f"{workdir} and {workdirs[0]} cannot be averaged, since their "
            f"training.loss are {other.training.loss} and {config.training.loss}, of "
            "which one has a softmax and the other sigmoids. Predict with each alone.",
        )
        theirs = other.data.class_names
        table = ClassMap(theirs).ids_of(names, what=str(workdirs[0]))
        checks.require(
            len(theirs) == len(names)
            and other.model.out_channels == config.model.out_channels,
            f"{workdir} has the classes {checks.few(theirs[1:])}, but {workdirs[0]} "
            f"{checks.few(names[1:])}; average networks of the same classes.",
        )
        count = config.model.out_channels
        orders.append(jnp.arange(count) if table is None else jnp.array(table[:count]))
    models = tuple(model for _, model, _ in found)
    mean = jax.tree_util.Partial(_log_mean, models, tuple(orders))
    return config, mean, {**info, "step": [about["step"] for _, _, about in found]}


def decision_of(config: ExperimentConfig) -> Decision:
    """Return how logits become labels and probabilities after this training.

    A custom loss that is not registered here counts as a softmax loss.
    """
    from swinsmt_jax.training.losses import LOSSES

    loss = LOSSES.get(config.training.loss)
    if loss is None:
        logging.warning(
            "training.loss %r is not registered here, so probabilities are a softmax; "
            "register it in losses.LOSSES if it is one-vs-all.",
            config.training.loss,
        )
    return LARGEST._replace(one_vs_all=loss is not None and loss.one_vs_all)


def _log_mean(models, orders, windows):
    """Return log probabilities `[b, *window, K]`, the mean over the networks."""
    total = 0.0
    for model, order in zip(models, orders, strict=True):
        logits = model(windows).astype(jnp.float32)
        total += jax.nn.softmax(logits, axis=-1)[..., order]
    return jnp.log(total / len(models) + jnp.finfo(jnp.float32).tiny)
