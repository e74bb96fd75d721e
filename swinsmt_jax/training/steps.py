"""The steps of a run: data in, updates, metrics, validation and checkpoints out."""

import contextlib
import functools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import jax
from absl import logging
from jax.sharding import Mesh

from swinsmt_jax import checks, sharding
from swinsmt_jax.config import ExperimentConfig
from swinsmt_jax.data import pipeline
from swinsmt_jax.runtime import cost, interrupts, memory, processes
from swinsmt_jax.runtime.profile import Profile
from swinsmt_jax.training import logs
from swinsmt_jax.training.checkpoint import Checkpoints, Origin
from swinsmt_jax.training.checkpoint_folder import METRIC
from swinsmt_jax.training.logs import Clock, Log, open_log
from swinsmt_jax.training.state import TrainState
from swinsmt_jax.training.step import TrainStep


@dataclass(frozen=True)
class Run:
    """What stays the same from step to step.

    Attributes:
        config: of the experiment.
        workdir: folder of the run.
        mesh: of the devices.
        cases: of the train split.
        origin: of the checkpoints.
        train_step: the jitted update.
        score: (parameters, poll) -> what `evaluation.run.validate` returns; what `poll`
            raises ends it early. None validates nothing.
        checkpoints: of the run.
        profile_steps: steps to trace.
    """

    config: ExperimentConfig
    workdir: Path
    mesh: Mesh
    cases: tuple
    origin: Origin
    train_step: TrainStep
    score: Callable[[dict, Callable[[], None]], dict] | None
    checkpoints: Checkpoints
    profile_steps: int = 0


def take_steps(run: Run, state: TrainState) -> TrainState:
    """Take the steps that are left and return the last state.

    A step is saved before it is validated. Where that validation was cut short, it is
    made up for first.

    Raises:
        UserError: as `loop.train`; where data are bad, the state before is saved.
        Interrupted: after a signal, once the state is saved.
    """
    start, stop = int(state.step), run.config.training.num_steps
    with (
        interrupts.listening() as listener,
        _batches(run, start=start) as batches,
        open_log(run.workdir, start=start, stop=stop) as log,
        Profile(
            run.workdir, steps=run.profile_steps, first=start + 1, stop=stop
        ) as profile,
    ):
        if start and _validates(run, start) and not run.checkpoints.is_scored(start):
            _validate(run, log, listener, state, {})
        if start >= stop:
            return state
        batch, names = _next(run, batches, state)
        train_step, clock = _compile(run, state, batch)
        pending = None  # the step before: its metrics are fetched while this one runs
        for step in range(start + 1, stop + 1):
            if step > start + 1:
                with clock.waiting():
                    batch, names = _next(run, batches, state)
            with profile.step(step):
                state, metrics = train_step(state, batch)
            profile.ended(step, metrics)
            if pending:
                values = _fetch(run, log, state, *pending) | clock.tick()
                _record(run, log, pending[0], values)
            pending = step, metrics, names
            signal, validates = listener.heard(step), _validates(run, step)
            if validates or signal or _due(run, step, "checkpoint_every"):
                values = _fetch(run, log, state, *pending) | clock.tick()
                pending, ends = None, signal and (validates or step < stop)
                if ends or not validates:
                    _record(run, log, step, values, always=validates)
                run.checkpoints.save(state, origin=run.origin)
                if ends:
                    run.checkpoints.wait()
                    processes.meet()  # the launcher may end all with the first one
                    raise interrupts.Interrupted(signal, step=step, stop=stop)
                if validates:
                    _validate(run, log, listener, state, values)
                clock.restart()
            run.checkpoints.check()
        run.checkpoints.wait()  # while signals are heard
    return state


def _next(run, batches, state):
    """Return the next batch on the devices, and the names of its cases."""
    try:
        batch = next(batches)
        names = [run.cases[i].name for i in batch["case"]]
        _require_known_labels(batch, names, run.config.model.out_channels)
    except checks.UserError as error:
        _save_before(run, state, error)
        raise
    return sharding.place_batch(batch, run.mesh), names


def _save_before(run, state, error):
    """Save the state before an error, unless other processes would have to help."""
    if jax.process_count() == 1 and int(state.step):
        _save_now(run, state)
        error.args = (f"{error} The state after step {state.step} is saved.",)


def _save_now(run, state):
    if int(state.step) not in run.checkpoints.steps():
        run.checkpoints.save(state, origin=run.origin)
    run.checkpoints.wait()


def _compile(run, state, batch):
    """Compile the step, and refuse one that does not fit into memory."""
    compiled = processes.compiled(run.train_step, state, batch)
    found = cost.measure(run.config, compiled, mesh=run.mesh)
    logging.info(
        "a step takes %.4g TFLOP, and on each device %s for state and batch and %s to "
        "compute with",
        found.operations / 1e12,
        memory.gigabytes(found.arguments),
        memory.gigabytes(found.temporaries),
    )
    cost.require_fit(found, run.config, devices=run.mesh.size)
    return compiled, Clock(run.config.data.batch_size, found)


def _validate(run, log: Log | None, listener, state, values):
    """Score a state that is being saved, and record that with the step's values."""
    step = int(state.step)
    if log is not None and values:
        log.progress(values)
    poll = functools.partial(listener.poll, step, run.config.training.num_steps)
    try:
        result = run.score(state.evaluated_params, poll)
    except interrupts.Interrupted:
        if log is not None and values:
            _write_row(run, log, step, values)
        run.checkpoints.wait()
        raise
    if log is not None:
        log.say("step %d: validation Dice %.4f", step, result["dice"])
        _write_row(run, log, step, values | _scores(result))
        log.pictures(step, result.get("pictures", {}))
    run.checkpoints.score(step, result["dice"])


def _fetch(run, log, state, step, metrics, names):
    """Bring a step's metrics to the host; tell of a step that was left out."""
    values = {name: float(value) for name, value in jax.device_get(metrics).items()}
    if values["skipped_in_row"]:
        _tell_skipped(run, log, state, step, values, names)
    return values


def _record(run, log: Log | None, step, values, *, always=False):
    """Show a step's metrics, and write them where they are due."""
    if log is None:
        return
    log.progress(values)
    if always or _due(run, step, "log_every"):
        _write_row(run, log, step, values)


def _write_row(run, log, step, values):
    try:
        log.row(step, values)
    except OSError as error:
        with contextlib.suppress(checks.UserError):
            run.checkpoints.wait()  # the one being written may still find room
        raise checks.UserError(
            f"{run.workdir / logs.FILE} cannot be written: {error.strerror}. "
            f"{run.checkpoints.intact()} Make room, and give the same command again."
        ) from error


def _tell_skipped(run, log, state, step, values, names):
    """Warn of a step without an update; save, and end the run, after many in a row."""
    names = [name for part in processes.gather(names) for name in part]
    what = (
        f"step {step}, on crops of {', '.join(names)}: the loss is {values['loss']:g} "
        f"and the norm of its gradient {values['grad_norm']:g}"
    )
    total, in_row = int(values["skipped"]), int(values["skipped_in_row"])
    if in_row < run.config.training.max_skipped:
        if log is not None:
            log.warn("%s; left out (%d so far, %d in a row)", what, total, in_row)
        return
    saved = [number for number in run.checkpoints.steps() if number <= step - in_row]
    latest = f"the checkpoint of step {saved[-1]} is" if saved else "no checkpoint is"
    _save_now(run, state)
    raise processes.SharedError(
        f"{what}, and {in_row} steps in a row were left out (training.max_skipped). "
        f"The parameters are those after step {step - in_row}, now saved as step "
        f"{int(state.step)}; {latest} from before. Start again in a new --workdir, "
        f"from them with --start_from={run.workdir}, with a lower "
        "optimizer.learning_rate or more optimizer.warmup_steps, or look at these "
        "cases."
    )


def _validates(run, step):
    return run.score is not None and _due(run, step, "eval_every")


def _due(run, step, rhythm):
    """Whether something happens after this step; it always does after the last."""
    every = getattr(run.config.training, rhythm)
    last = step == run.config.training.num_steps
    return last or (every > 0 and step % every == 0)


def _scores(result):
    """Flatten what `validate` returned to the names of the metrics."""
    groups = {f"{METRIC}/{name}": v for name, v in result.get("groups", {}).items()}
    return {METRIC: result["dice"], **groups}


@contextlib.contextmanager
def _batches(run, *, start):
    batches = pipeline.training_batches(
        run.config.data,
        run.cases,
        seed=run.config.training.seed,
        start_step=start,
        process_index=jax.process_index(),
        process_count=jax.process_count(),
    )
    with contextlib.closing(batches):
        yield batches


def _require_known_labels(batch, names, num_classes):
    tops = batch["label"].max(axis=(1, 2, 3))
    for name, top in zip(names, tops, strict=True):
        checks.require(
            top < num_classes,
            f"case {name!r} holds label {top}, but model.out_channels is "
            f"{num_classes}, background included, so labels end at {num_classes - 1}.",
        )
