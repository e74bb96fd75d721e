"""Checkpoints: the state of a run and what it belongs to, written by Orbax.

Kept are the latest two and the best by validation Dice. They are written in the
background; a half-written one is never taken for complete. A checkpoint is restored
onto stated shardings, so a run may continue on another mesh.
"""

import contextlib
import functools
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import jax
import orbax.checkpoint as ocp
from absl import logging
from flax import nnx
from orbax.checkpoint import checkpoint_managers

from swinsmt_jax import checks
from swinsmt_jax.config import ExperimentConfig, from_config_dict, to_dict
from swinsmt_jax.models import abstract_model
from swinsmt_jax.runtime import processes
from swinsmt_jax.runtime.files import replacing
from swinsmt_jax.training.checkpoint_folder import (
    DAMAGED,
    METRIC,
    METRICS,
    DamagedError,
    meta_of,
    metrics_of,
    put_aside,
    read_parameters,
    readable,
    require_same_parameters,
    steps_of,
)
from swinsmt_jax.training.state import TrainState
from swinsmt_jax.training.workdir import CHECKPOINTS

LATEST_KEPT = 2


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

    def save(self, state: TrainState, *, origin: Origin) -> None:
        """Write the state in the background.

        Device memory of `state` is free to be donated when this returns.

        Raises:
            UserError: if this checkpoint or the one before could not be written; those
                that were complete stay as they are.
        """
        items = ocp.args.Composite(
            state=ocp.args.StandardSave(state),
            meta=ocp.args.JsonSave(origin.to_json()),
        )
        with self._written():
            self._manager.save(int(state.step), args=items, force=True)

    def score(self, step: int, dice: float) -> None:
        """Record the validation Dice of a saved step; drop the best one before.

        Raises:
            UserError: if the checkpoint or its Dice could not be written.
        """
        self.wait()
        folder = Path(self._manager.directory) / str(step)

        def write():
            value = dice if math.isfinite(dice) else None
            with self._written(), replacing(folder / METRICS) as partial:
                partial.mkdir()
                (partial / METRICS).write_text(json.dumps({METRIC: value}))

        processes.together(lambda: write() if processes.is_first() else None)
        with self._written():
            self._manager.reload()
            steps = self.steps()
            kept = {*steps[-LATEST_KEPT:], self._manager.best_step()}
            for old in set(steps) - kept:
                self._manager.delete(old)

    def is_scored(self, step: int) -> bool:
        """Whether a validation of this step is recorded."""
        return processes.gather(self._manager.metrics(step) is not None)[0]

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

        A checkpoint that one of the processes finds damaged is moved to the workdir's
        folder "damaged", with a line in the log, and the one before it is read.

        Raises:
            UserError: for a checkpoint of another model, seed, batch size or data, for
                one that cannot be read now, and if none of them can be read at all.
        """
        root, any_damaged = Path(self._manager.directory), False
        while (step := processes.gather(self._manager.latest_step())[0]) is not None:
            folder = root / str(step)

            read = functools.partial(_restore, folder, like, origin=origin)
            state, damage = processes.together(functools.partial(_damage_of, read))
            damages = [text for text in processes.gather(damage) if text]
            if not damages:
                return state
            processes.together(functools.partial(put_aside, folder, damages[0]))
            self._manager.reload()
            any_damaged = True
        checks.require(
            not any_damaged,
            f"none of the checkpoints could be read; they are now in "
            f"{root.parent / DAMAGED}. Start again in a new --workdir, or with the "
            "same command from step 0.",
        )
        return None

    def intact(self) -> str:
        """Say which checkpoint is the latest complete one."""
        steps = self._manager.all_steps(read=True)
        latest = f"that of step {max(steps)}" if steps else "none"
        return f"The latest complete checkpoint is {latest}, and it is intact."

    @contextlib.contextmanager
    def _written(self):
        """Turn what storage libraries raise on failed writes into a `UserError`."""
        try:
            yield
        except (ValueError, OSError, RuntimeError) as error:
            reason = " ".join(str(error).split())[:300]
            raise checks.UserError(
                f"a checkpoint could not be written to {self._manager.directory} "
                f"({reason}). {self.intact()} Make room or mend the folder's "
                "permissions, and give the same command again."
            ) from error


@contextlib.contextmanager
def open_checkpoints(workdir: str | Path) -> Iterator[Checkpoints]:
    """Open the checkpoints of a run for writing; wait for the last one at the end."""
    folder = Path(workdir).absolute() / CHECKPOINTS
    processes.together(lambda: _check_scores(folder) if processes.is_first() else None)
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

    Where no number is asked for, a checkpoint that is damaged is passed over, with a
    line in the log.

    Raises:
        UserError: for a folder without checkpoints, a step that is not there, and a
            checkpoint that cannot be read or is of another model.
    """
    root = Path(workdir).absolute() / CHECKPOINTS
    checks.require(
        root.is_dir(),
        f"{workdir} holds no checkpoints; give the --workdir of a training run, or "
        "train first: python train.py --config=... --workdir=...",
    )
    *others, last = _candidates(root, step)
    for candidate in others:
        try:
            return _load(root / str(candidate))
        except DamagedError as error:
            logging.error("%s; another one is taken", error)
    try:
        return _load(root / str(last))
    except DamagedError as error:
        raise DamagedError(
            f"{error}. If there is another one, --step takes it."
        ) from error


def _load(folder):
    config = from_config_dict(meta_of(folder)["config"])
    metrics = {n: value for n, value in metrics_of(folder).items() if value is not None}
    graphdef, params = abstract_model(config.model)
    part = "average" if config.training.ema_decay else "params"
    params = read_parameters(folder, params, part=part)
    model = nnx.merge(graphdef, params)
    return config, model, {"step": int(folder.name), "metrics": metrics}


def _restore(folder, like, *, origin):
    checks.require(
        folder.is_dir(),
        f"process {jax.process_index()} does not see the checkpoint {folder}; give a "
        "--workdir on a file system that all hosts share.",
    )
    _require_same_origin(folder, meta_of(folder), origin.to_json())
    require_same_parameters(folder, like.params)
    with readable(folder):  # by the handler itself, which waits for no process
        return ocp.StandardCheckpointHandler().restore(
            folder / "state", args=ocp.args.StandardRestore(like)
        )


def _damage_of(read):
    """Return what was read, or why that is damaged."""
    try:
        return read(), None
    except DamagedError as error:
        return None, str(error)


def _check_scores(root):
    """Put aside what would keep Orbax from listing the checkpoints."""
    for step in steps_of(root):
        try:
            metrics_of(root / str(step))
        except DamagedError as error:
            put_aside(root / str(step), error)


def _candidates(root, step):
    """Return the steps that answer to a wish, the best answer first."""
    steps = steps_of(root)
    checks.require(
        bool(steps),
        f"{root} holds no complete checkpoint; train for at least "
        "training.checkpoint_every steps.",
    )
    if step not in (None, "latest", "best"):
        checks.require(
            step in steps,
            f"{root} holds no checkpoint of step {step!r}; there are "
            f"{', '.join(map(str, steps))}, and the names 'best' and 'latest'.",
        )
        return [step]
    if step == "latest":
        return steps[::-1]
    scores = {number: _score(root / str(number)) for number in steps}
    scored = [number for number in steps if scores[number] is not None]
    checks.require(
        step != "best" or bool(scored),
        "there is no best checkpoint, since no validation was run; take "
        f"--step=latest or one of {steps}.",
    )
    scored.sort(key=lambda number: (scores[number], number), reverse=True)
    others = [number for number in steps[::-1] if number not in scored]
    return scored + ([] if step == "best" else others)


def _score(folder):
    try:
        return metrics_of(folder).get(METRIC)
    except DamagedError as error:
        logging.error("%s; it is not considered as the best", error)


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


def _options():
    def dice(metrics):
        found = metrics[METRIC]
        return -math.inf if found is None else found

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
    )
