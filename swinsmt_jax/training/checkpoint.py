"""Checkpoints: the state of a run and what it belongs to, written by Orbax.

Kept are the latest two and the best by validation Dice. They are written in the
background; a half-written one is never taken for complete. A checkpoint is restored
onto stated shardings, so a run may continue on another mesh.
"""

import contextlib
import math
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from absl import logging
from flax import nnx
from orbax.checkpoint import checkpoint_managers

from swinsmt_jax import checks
from swinsmt_jax.config import ExperimentConfig, from_config_dict, to_dict
from swinsmt_jax.sharding import path_name
from swinsmt_jax.training import processes
from swinsmt_jax.training.state import TrainState, abstract_model

FOLDER = "checkpoints"
DAMAGED = "damaged"
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


class DamagedError(checks.UserError):
    """A checkpoint that cannot be read, though it was once complete."""


class Checkpoints:
    """The checkpoints of a workdir; open with `open_checkpoints`."""

    def __init__(self, manager: ocp.CheckpointManager):
        self._manager = manager

    def save(
        self, state: TrainState, *, origin: Origin, dice: float | None = None
    ) -> None:
        """Write the state in the background, with its validation Dice if there is one.

        Device memory of `state` is free to be donated when this returns.

        Raises:
            UserError: if this checkpoint or the one before could not be written; those
                that were complete stay as they are.
        """
        items = ocp.args.Composite(
            state=ocp.args.StandardSave(state),
            meta=ocp.args.JsonSave(origin.to_json()),
        )
        scored = dice is not None and math.isfinite(dice)
        metrics = {METRIC: dice} if scored else None
        with self._written():
            self._manager.save(int(state.step), args=items, metrics=metrics, force=True)

    def steps(self) -> list[int]:
        """Return the steps of the checkpoints, the one being written included."""
        return sorted(self._manager.all_steps())

    def check(self) -> None:
        """Raise the `UserError` of a checkpoint that failed in the background."""
        with self._written():
            self._manager.check_for_errors()

    def wait(self) -> None:
        """Wait until the last checkpoint is complete; a `UserError` if it failed."""
        with self._written():
            self._manager.wait_until_finished()

    def restore_latest(self, like: TrainState, *, origin: Origin) -> TrainState | None:
        """Read the latest state onto the shardings of `like`; None if there is none.

        A checkpoint that cannot be read is moved to the workdir's folder "damaged",
        with a line in the log, and the one before it is read.

        Raises:
            UserError: for a checkpoint of another model, seed, batch size or data, and
                if there are checkpoints but none can be read.
        """
        damaged = []
        while (step := self._manager.latest_step()) is not None:
            try:
                return self._restore(step, like, origin=origin)
            except DamagedError as error:
                damaged.append(self._put_aside(step))
                logging.error("%s; going on with the one before it", error)
        checks.require(
            not damaged,
            f"none of the checkpoints could be read; they are now in {damaged[:1]}. "
            "Start again in a new --workdir, or with the same command from step 0.",
        )
        return None

    def _restore(self, step, like, *, origin):
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

    def _put_aside(self, step):
        """Move a damaged checkpoint out of the way and return where it is."""
        folder = Path(self._manager.directory)
        target = folder.parent / DAMAGED / str(step)
        if processes.is_first():
            target.parent.mkdir(exist_ok=True)
            while target.exists():
                target = target.with_name(target.name + "_")
            os.replace(folder / str(step), target)
        processes.meet()
        self._manager.reload()
        return target

    @contextlib.contextmanager
    def _written(self):
        """Turn what storage libraries raise on failed writes into a `UserError`."""
        try:
            yield
        except (ValueError, OSError, RuntimeError) as error:
            steps = sorted(self._manager.all_steps(read=True))
            latest = f"that of step {steps[-1]}" if steps else "none"
            reason = " ".join(str(error).split())[:300]
            raise checks.UserError(
                f"a checkpoint could not be written to {self._manager.directory} "
                f"({reason}). The latest complete one is {latest}, and it is intact. "
                "Make room or mend the folder's permissions, and give the same command "
                "again."
            ) from error


@contextlib.contextmanager
def open_checkpoints(workdir: str | Path) -> Iterator[Checkpoints]:
    """Open the checkpoints of a run for writing; wait for the last one at the end."""
    folder = Path(workdir).absolute() / FOLDER
    manager = ocp.CheckpointManager(folder, options=_options())
    checkpoints = Checkpoints(manager)
    try:
        yield checkpoints
        checkpoints.wait()
    finally:
        with contextlib.suppress(ValueError, OSError, RuntimeError):
            manager.close()  # what it may raise has been told above


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
    part = "average" if config.training.ema_decay else "params"
    params = _read_parameters(root / str(step), params, part=part)
    model = nnx.merge(graphdef, params)
    return config, model, {"step": step, "metrics": dict(metrics)}


def require_same_parameters(
    folder: Path, params: Mapping, *, part: str = "params"
) -> None:
    """Raise `UserError` unless a checkpoint holds parameters of these shapes."""
    with _readable(folder), ocp.PyTreeCheckpointer() as reader:
        saved = reader.metadata(folder / "state").item_metadata.tree[part]
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


def _read_parameters(folder, like, *, part):
    """Parameters as arrays that are not tied to a device."""
    require_same_parameters(folder, like, part=part)
    wanted = {part: like}
    as_numpy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), wanted)
    with _readable(folder), ocp.PyTreeCheckpointer() as reader:
        found = reader.restore(
            folder / "state",
            args=ocp.args.PyTreeRestore(
                item=wanted, restore_args=as_numpy, partial_restore=True
            ),
        )
    return jax.tree.map(jnp.asarray, found[part])


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
        raise DamagedError(
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
