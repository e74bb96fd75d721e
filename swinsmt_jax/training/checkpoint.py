"""Checkpoints: the state of a run with its config and data, written by Orbax.

A run keeps the latest two checkpoints and the best by validation Dice. They are written
in the background, and a partial one never passes for a complete one. A checkpoint is
restored onto given shardings, so a run may continue on another mesh.
"""

import contextlib
import dataclasses
import functools
import math
import shutil
from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp
from absl import logging
from flax import nnx

from swinsmt_jax import checks
from swinsmt_jax.config import ExperimentConfig, from_config_dict, to_dict
from swinsmt_jax.data import pipeline
from swinsmt_jax.models import abstract_model, merge_buffers, split_buffers
from swinsmt_jax.runtime import processes
from swinsmt_jax.runtime.files import (
    PARTIAL,
    absolute,
    remove,
    remove_partial,
    replacing,
    writable,
)
from swinsmt_jax.sharding import path_name
from swinsmt_jax.training import checksums
from swinsmt_jax.training.checkpoint_folder import (
    CASES,
    DAMAGED,
    METRIC,
    METRICS,
    SCORES,
    STATE,
    DamagedError,
    dice_of,
    meta_of,
    put_aside,
    ranked,
    ranked_by_cases,
    read,
    require_same_parameters,
    score_of,
    steps_of,
)
from swinsmt_jax.training.state import TrainState
from swinsmt_jax.training.workdir import CHECKPOINTS

LATEST_KEPT = 2
EMA = "average"  # the name of `TrainState.ema_params` in checkpoints
CHECKSUMS = "checksums"  # of the arrays, in what a checkpoint belongs to


def origin_of(config: ExperimentConfig, *, data: str) -> dict:
    """Return the origin of a checkpoint; `data` is the train split's fingerprint."""
    return {
        "config": to_dict(config),
        "seed": config.training.seed,
        "batch_size": config.data.batch_size,
        "data": data,
    }


class Checkpoints:
    """The checkpoints of a workdir; open with `open_checkpoints`.

    Methods raise a `UserError` if a checkpoint cannot be written, now or in the
    background. Complete checkpoints stay as they are.
    """

    def __init__(self, root: Path, writer: ocp.AsyncCheckpointer, cases: str = ""):
        self._root, self._writer, self._cases = root, writer, cases
        self._steps = processes.gather(steps_of(root))[0]

    def probe(self) -> None:
        """Write a few numbers as a checkpoint is written, and read them back.

        Raises:
            UserError: if that fails, for example because Orbax takes the path for a
                pattern.
        """
        folder, probe = self._root / f"{PARTIAL}probe", {"probe": np.arange(3.0)}
        state = ocp.args.StandardSave(probe)
        with self._written():
            self._writer.save(folder, args=ocp.args.Composite(state=state))
            self._writer.wait_until_finished()

        def check():
            args = ocp.args.StandardRestore(probe)
            try:
                ocp.StandardCheckpointHandler().restore(folder / STATE, args=args)
            except (MemoryError, jax.errors.JaxRuntimeError):
                raise
            except Exception as error:  # storage libraries raise almost anything
                raise checks.UserError(
                    f"the workdir {self._root.parent} cannot be used: what is saved "
                    f"there cannot be read back ({type(error).__name__}); [ and \\ in "
                    "a path are a pattern to Orbax. Choose another --workdir."
                ) from error
            finally:
                shutil.rmtree(folder, ignore_errors=True)

        processes.on_first(check)

    def save(self, state: TrainState, *, origin: dict) -> None:
        """Write the state and its `origin_of` in the background.

        `state` may be donated once this returns.
        """
        self.wait()
        step = int(state.step)
        meta = origin | {CHECKSUMS: checksums.of_state(_fields(state))}
        args = ocp.args.Composite(
            state=ocp.args.StandardSave(_fields(state)), meta=ocp.args.JsonSave(meta)
        )
        with self._written():
            self._writer.save(self._root / str(step), args=args)
        self._steps.append(step)

    def score(self, step: int, dice: float) -> None:
        """Record the validation Dice of a saved step; drop the previous best."""
        self.wait()
        metrics = {METRIC: dice if math.isfinite(dice) else None, CASES: self._cases}

        def write():
            target = self._root / str(step) / METRICS
            with self._written(), replacing(target) as partial:
                partial.mkdir()
                SCORES.save(partial, args=ocp.args.JsonSave(metrics))

        processes.on_first(write)
        self._drop_old()

    def is_scored(self, step: int) -> bool:
        """Whether a validation of this step on these cases is recorded."""
        folder = self._root / str(step)
        known = (folder / METRICS).exists() and score_of(folder)[1] == self._cases
        return processes.gather(known)[0]

    def scored_elsewhere(self) -> list[int]:
        """Return the steps that were scored on other validation cases."""
        sets = processes.gather(ranked_by_cases(self._root))[0]
        return sorted(n for c, own in sets.items() if c != self._cases for n in own)

    def steps(self) -> list[int]:
        """Return the steps of the checkpoints, including the one being written."""
        return sorted(self._steps)

    def check(self) -> None:
        """Raise the `UserError` of a write that failed in the background."""
        with self._written():
            self._writer.check_for_errors()

    def wait(self) -> None:
        """Wait until the last checkpoint is complete, and drop superseded ones."""
        with self._written():
            self._writer.wait_until_finished()
        self._drop_old()

    def _drop_old(self):
        old = self.steps()[:-LATEST_KEPT]
        if not old:
            return
        sets = processes.gather(ranked_by_cases(self._root))[0]
        for step in set(old) - {own[0] for own in sets.values()}:
            self._steps.remove(step)
            processes.on_first(functools.partial(remove, self._root / str(step)))

    def restore_latest(
        self, abstract: TrainState, *, origin: dict
    ) -> TrainState | None:
        """Read the latest state onto the shardings of `abstract`; None if none exists.

        A checkpoint that a process finds damaged moves to the workdir's folder
        "damaged", with a line in the log. Then the previous one is read.

        Raises:
            UserError: for a checkpoint of another model, seed or data, for one that
                cannot be read now, and if none can be read at all.
        """
        damage = None
        while self._steps:
            folder = self._root / str(self._steps[-1])
            state, damage = _restore(folder, abstract, origin=origin)
            if damage is None:
                return state
            processes.on_first(functools.partial(put_aside, folder, damage))
            self._steps.pop()
        checks.require(
            damage is None,
            f"none of the checkpoints could be read; they are now in "
            f"{self._root.parent / DAMAGED}. Start again in a new --workdir, or with "
            "the same command from step 0.",
        )
        return None

    def restore(self, step: int, abstract: TrainState, *, origin: dict) -> TrainState:
        """Read the state of a step; raises as `restore_latest`."""
        folder = self._root / str(step)
        state, damage = _restore(folder, abstract, origin=origin)
        checks.require(state is not None, f"{damage}; remove {folder}.")
        return state

    def intact(self) -> str:
        """Say which checkpoint is the latest complete one."""
        steps = steps_of(self._root)
        latest = f"that of step {steps[-1]}" if steps else "none"
        return f"The latest complete checkpoint is {latest}, and it is intact."

    @contextlib.contextmanager
    def _written(self):
        """Turn storage libraries' errors on failed writes into a `UserError`."""
        try:
            yield
        except (ValueError, OSError, RuntimeError) as error:
            raise checks.UserError(
                f"a checkpoint could not be written to {self._root} "
                f"({checks.one_line(error)}). {self.intact()} Make room or fix the "
                "folder's permissions, and give the same command again."
            ) from error


@contextlib.contextmanager
def open_checkpoints(workdir: str | Path, *, cases: str = "") -> Iterator[Checkpoints]:
    """Open the checkpoints of a run for writing; wait for the last one at the end.

    `cases` is the fingerprint of the validation cases that score the steps.
    """
    root = absolute(workdir) / CHECKPOINTS
    processes.on_first(lambda: _clean(root))
    writer = ocp.AsyncCheckpointer(ocp.CompositeCheckpointHandler())
    checkpoints = Checkpoints(root, writer, cases)
    try:
        checkpoints.probe()
        yield checkpoints
        checkpoints.wait()
    finally:
        with contextlib.suppress(ValueError, OSError, RuntimeError):
            writer.close()  # what it may raise has been told above


def _clean(root):
    """Make the folder; remove partial files of killed runs."""
    with writable(root):
        root.mkdir(parents=True, exist_ok=True)
        remove_partial(root)
        for left in ocp.path.step.all_temporary_paths(root):
            shutil.rmtree(left.get())


def _restore(folder, abstract, *, origin):
    """Return (state, None), or (None, the damage that some process found)."""

    def attempt():
        checks.require(
            folder.is_dir(),
            f"process {jax.process_index()} does not see the checkpoint {folder}; give "
            "a --workdir on a file system that all hosts share.",
        )
        try:
            meta = meta_of(folder)
            _require_same_origin(folder, meta, origin)
            dice_of(folder)
            for part, arrays in _parts(abstract.params, abstract.buffers).items():
                require_same_parameters(folder, arrays, part=part)
            # by the handler itself, which waits for no process
            handler = ocp.StandardCheckpointHandler()
            args = ocp.args.StandardRestore(_fields(abstract))

            def restore():
                found = handler.restore(folder / STATE, args=args)
                checksums.require_same(found, meta.get(CHECKSUMS, {}))
                return TrainState(ema_params=found.pop(EMA), **{"buffers": {}, **found})

            return read(folder, restore), None
        except DamagedError as error:
            return None, str(error)

    state, damage = processes.run_on_all(attempt)
    return state, next(filter(None, processes.gather(damage)), None)


def _fields(state):
    """Return the fields of a state by name, as in checkpoints.

    Networks without buffers lack that field, as do all early checkpoints.
    """
    fields = {f.name: getattr(state, f.name) for f in dataclasses.fields(state)}
    fields[EMA] = fields.pop("ema_params")
    if not state.buffers:
        del fields["buffers"]
    return fields


def _parts(params, buffers):
    """Return the parts of a checkpoint that contain its network's arrays."""
    return {"params": params} | ({"buffers": buffers} if buffers else {})


def _require_same_origin(folder, found, wanted):
    reasons = {
        "seed": "training.seed decides the order of the data",
        "data": "cases of the train split, their order or their files changed",
    }
    checks.require(
        found.get("data") != "",
        f"the checkpoint {folder} holds weights alone, not the state of a training, so "
        "it cannot be continued; choose another --workdir and give "
        f"--start_from={folder.parent.parent}.",
    )
    for key, reason in reasons.items():
        checks.require(
            found.get(key) == wanted[key],
            f"the checkpoint {folder} cannot be continued: its {key} is "
            f"{found.get(key)!r}, but now {wanted[key]!r} ({reason}). Restore it, or "
            "choose another --workdir.",
        )


def load_model(
    workdir: str | Path, *, step: int | str | None = None
) -> tuple[ExperimentConfig, nnx.Module, dict]:
    """Read the config and the network of a checkpoint, without the optimiser's state.

    A damaged one is skipped, with a line in the log, unless a number is requested.
    A training run may be active in the workdir.

    Args:
        workdir: of a training run.
        step: a number, "latest" or "best" by validation Dice; None takes the best, or
            the latest without a validation.

    Returns:
        The run's config, the network, and {"step": number, "metrics": of that step}.

    Raises:
        UserError: for a folder without checkpoints, a missing step, and a checkpoint
            that cannot be read or belongs to another model.
    """
    root = absolute(workdir) / CHECKPOINTS
    while True:
        gone = False
        for candidate in (steps := _candidates(root, step)):
            try:
                return _load(root / str(candidate))
            except DamagedError as error:
                damage = error
                if not (root / str(candidate)).exists():
                    gone = True  # a training that runs keeps the latest ones alone
                elif candidate != steps[-1]:
                    logging.error("%s; another one is used", error)
        if not gone:
            raise damage


def _load(folder):
    meta, dice = meta_of(folder), dice_of(folder)
    config = from_config_dict(meta["config"])
    config = dataclasses.replace(config, data=pipeline.recalled(config.data))
    graphdef, abstract = abstract_model(config.model)
    averaged = config.training.ema_decay > 0
    wanted = {EMA: abstract} if averaged else _parts(*split_buffers(graphdef, abstract))
    for part, arrays in wanted.items():
        require_same_parameters(folder, arrays, part=part)
    as_numpy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), wanted)
    args = ocp.args.PyTreeRestore(wanted, restore_args=as_numpy, partial_restore=True)
    with ocp.PyTreeCheckpointer() as reader:

        def restore():
            found = reader.restore(folder / STATE, args=args)
            checksums.require_same(found, meta.get(CHECKSUMS, {}))
            return found

        found = read(folder, restore)
    leaves = map(jax.tree_util.tree_leaves_with_path, found.values())
    named = {path_name(path): leaf for part in leaves for path, leaf in part}
    checks.finite(f"the checkpoint {folder}", named)
    found = jax.device_put(found)  # not tied to a device
    arrays = found[EMA] if averaged else merge_buffers(**{"buffers": {}, **found})
    metrics = {} if dice is None else {METRIC: dice}
    about = {"step": int(folder.name), "metrics": metrics}
    return config, nnx.merge(graphdef, arrays), about


def _candidates(root, step):
    """Return the steps that match a request, the best match first."""
    steps = steps_of(root)
    checks.require(
        bool(steps),
        f"{root} holds no complete checkpoint; give the --workdir of a training run, "
        "or train first, for at least training.checkpoint_every steps: python train.py "
        "--config=... --workdir=...",
    )
    if step == "latest":
        return steps[::-1]
    if step is None or step == "best":
        best = ranked(root)
        checks.require(
            step is None or bool(best),
            "there is no best checkpoint, since no validation was run; take "
            f"--step=latest or one of {steps}.",
        )
        return best + [n for n in steps[::-1] if step is None and n not in best]
    number = int(step) if str(step).isdecimal() else step
    checks.require(
        number in steps,
        f"{root} holds no checkpoint of step {number!r}; there are "
        f"{', '.join(map(str, steps))}, and the names 'best' and 'latest'.",
    )
    return [number]
