"""Checkpoints: the state of a run and what it belongs to, written by Orbax.

Kept are the latest two and the best by validation Dice. They are written in the
background; a half-written one is never taken for complete. A checkpoint is restored
onto stated shardings, so a run may continue on another mesh.
"""

import contextlib
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from flax import nnx
from orbax.checkpoint import checkpoint_managers

from swinsmt_jax import checks
from swinsmt_jax.config import ExperimentConfig, from_config_dict, to_dict
from swinsmt_jax.sharding import path_name
from swinsmt_jax.training.state import TrainState, abstract_model

FOLDER = "checkpoints"
METRIC = "val_dice"
LATEST_KEPT = 2
SHOWN = 6  # differing parameters in a message


@dataclass(frozen=True)
class Origin:
    """What a checkpoint belongs to, besides its parameters.

    Attributes:
        config: of the experiment; seed and batch size are taken from here.
        data: fingerprint of the training cases.
    """

    config: ExperimentConfig
    data: str

    def to_json(self) -> dict:
        """Return the content of the checkpoint's `meta`."""
        return {
            "config": to_dict(self.config),
            "seed": self.config.training.seed,
            "batch_size": self.config.data.batch_size,
            "data": self.data,
        }


class Checkpoints:
    """The checkpoints of a workdir; open with `open_checkpoints`."""

    def __init__(self, manager: ocp.CheckpointManager):
        self._manager = manager

    def save(
        self, state: TrainState, *, origin: Origin, dice: float | None = None
    ) -> None:
        """Write the state in the background, with its validation Dice if there is one.

        Device memory of `state` is free to be donated when this returns.
        """
        items = ocp.args.Composite(
            state=ocp.args.StandardSave(state),
            meta=ocp.args.JsonSave(origin.to_json()),
        )
        scored = dice is not None and math.isfinite(dice)
        metrics = {METRIC: dice} if scored else None
        self._manager.save(int(state.step), args=items, metrics=metrics, force=True)

    def restore_latest(self, like: TrainState, *, origin: Origin) -> TrainState | None:
        """Read the latest state onto the shardings of `like`; None if there is none.

        Raises:
            UserError: for a checkpoint of another model, seed, batch size or data, or
                one that cannot be read.
        """
        step = self._manager.latest_step()
        if step is None:
            return None
        folder = Path(self._manager.directory) / str(step)
        with _readable(folder):
            found = self._manager.restore(
                step, args=ocp.args.Composite(meta=ocp.args.JsonRestore())
            ).meta
        _require_same_origin(folder, found, origin.to_json())
        require_same_parameters(folder, like.params)
        with _readable(folder):
            return self._manager.restore(
                step, args=ocp.args.Composite(state=ocp.args.StandardRestore(like))
            ).state


@contextlib.contextmanager
def open_checkpoints(workdir: str | Path) -> Iterator[Checkpoints]:
    """Open the checkpoints of a run for writing; wait for the last one at the end."""
    folder = Path(workdir).absolute() / FOLDER
    with ocp.CheckpointManager(folder, options=_options()) as manager:
        yield Checkpoints(manager)
        manager.wait_until_finished()


def load_model(
    workdir: str | Path, *, step: int | str | None = None
) -> tuple[ExperimentConfig, nnx.Module, dict]:
    """Read the config and the network of a checkpoint, without the optimiser's state.

    Args:
        workdir: of a training run.
        step: a number, "latest" or "best" by validation Dice; None takes the best, or
            the latest if none was validated.

    Returns:
        The run's config, the network, and {"step": number, "metrics": of that step}.

    Raises:
        UserError: for a folder without checkpoints, a step that is not there, and a
            checkpoint that cannot be read or is of another model.
    """
    root = Path(workdir).absolute() / FOLDER
    checks.require(
        root.is_dir(),
        f"{workdir} holds no checkpoints; give the --workdir of a training run, or "
        "train first: python train.py --config=... --workdir=...",
    )
    with ocp.CheckpointManager(root, options=_options(read_only=True)) as manager:
        step = _choose(manager, step, root)
        metrics = manager.metrics(step) or {}
        with _readable(root / str(step)):
            meta = manager.restore(
                step, args=ocp.args.Composite(meta=ocp.args.JsonRestore())
            ).meta
            config = from_config_dict(meta["config"])
    graphdef, params = abstract_model(config.model)
    params = _read_parameters(root / str(step), params)
    model = nnx.merge(graphdef, params)
    return config, model, {"step": step, "metrics": dict(metrics)}


def require_same_parameters(folder: Path, params: Mapping) -> None:
    """Raise `UserError` unless a checkpoint holds parameters of these shapes."""
    with _readable(folder), ocp.PyTreeCheckpointer() as reader:
        saved = reader.metadata(folder / "state").item_metadata.tree["params"]
    saved, wanted = _shapes(saved), _shapes(params)
    differing = [
        f"{name}: {saved.get(name, 'absent')} in the checkpoint, "
        f"{wanted.get(name, 'absent')} in the network"
        for name in sorted(saved.keys() | wanted.keys())
        if saved.get(name) != wanted.get(name)
    ]
    more = len(differing) - SHOWN
    checks.require(
        not differing,
        f"the checkpoint {folder} is of another model; {len(differing)} parameters "
        f"differ: {'; '.join(differing[:SHOWN])}"
        f"{f'; and {more} more' if more > 0 else ''}. Use the config it was trained "
        "with.",
    )


def _shapes(tree):
    leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
    return {path_name(path): tuple(leaf.shape) for path, leaf in leaves}


def _read_parameters(folder, like):
    """Parameters as arrays that are not tied to a device."""
    require_same_parameters(folder, like)
    wanted = {"params": like}
    as_numpy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), wanted)
    with _readable(folder), ocp.PyTreeCheckpointer() as reader:
        found = reader.restore(
            folder / "state",
            args=ocp.args.PyTreeRestore(
                item=wanted, restore_args=as_numpy, partial_restore=True
            ),
        )
    return jax.tree.map(jnp.asarray, found["params"])


def _choose(manager, step, root):
    steps, best = sorted(manager.all_steps()), manager.best_step()
    checks.require(
        bool(steps),
        f"{root} holds no complete checkpoint; train for at least "
        "training.checkpoint_every steps.",
    )
    if step in (None, "latest", "best"):
        checks.require(
            step != "best" or best is not None,
            "there is no best checkpoint, since no validation was run; take "
            f"--step=latest or one of {steps}.",
        )
        return steps[-1] if step == "latest" or best is None else best
    checks.require(
        step in steps,
        f"{root} holds no checkpoint of step {step!r}; there are "
        f"{', '.join(map(str, steps))}, and the names 'best' and 'latest'.",
    )
    return step


def _require_same_origin(folder, found, wanted):
    reasons = {
        "seed": "training.seed decides the order of the data",
        "batch_size": "data.batch_size decides which crops a step has seen",
        "data": "cases of the train split, their order or their files changed",
    }
    for key, reason in reasons.items():
        checks.require(
            found.get(key) == wanted[key],
            f"the checkpoint {folder} cannot be continued: its {key} is "
            f"{found.get(key)!r}, but now {wanted[key]!r} ({reason}). Restore it, or "
            "choose another --workdir.",
        )


@contextlib.contextmanager
def _readable(folder):
    """Turn what storage libraries raise on damaged files into a `UserError`."""
    try:
        yield
    except (ValueError, KeyError, TypeError, OSError, AttributeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise checks.UserError(
            f"the checkpoint {folder} cannot be read; it is damaged or incomplete "
            f"({reason}). Remove this folder to use the checkpoint before it."
        ) from error


def _options(**changes):
    def dice(metrics):
        return metrics[METRIC]

    policies = [
        checkpoint_managers.LatestN(LATEST_KEPT),
        checkpoint_managers.BestN(
            get_metric_fn=dice, n=1, keep_checkpoints_without_metrics=False
        ),
    ]
    return ocp.CheckpointManagerOptions(
        best_fn=dice,  # without it, best_step() would be the latest one
        best_mode="max",
        preservation_policy=checkpoint_managers.AnyPreservationPolicy(policies),
        cleanup_tmp_directories=True,
        **changes,
    )
