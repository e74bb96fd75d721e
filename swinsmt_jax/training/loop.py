"""Training: from a config and a workdir to a trained network.

A run is a pure function of its config. When restarted, it continues from its latest
checkpoint with the same data and random keys as without the interruption.
"""

import contextlib
import dataclasses
import functools
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import jax
from absl import logging

from swinsmt_jax import checks, sharding
from swinsmt_jax.config import ExperimentConfig, TrainingConfig
from swinsmt_jax.data import pipeline
from swinsmt_jax.ops import by_platform
from swinsmt_jax.runtime import cost, memory, processes, record, signals, xla_flags
from swinsmt_jax.runtime.profile import Profile
from swinsmt_jax.runtime.statuses import Interrupted
from swinsmt_jax.training import logs, losses, remat, setup
from swinsmt_jax.training.checkpoint import Checkpoints, open_checkpoints, origin_of
from swinsmt_jax.training.checkpoint_folder import AHEAD, METRIC, crops_until
from swinsmt_jax.training.continuing import continued
from swinsmt_jax.training.logs import Clock, open_log
from swinsmt_jax.training.state import TrainState
from swinsmt_jax.training.workdir import CHECKPOINTS, locked, open_workdir, requeued

Validate = Callable[..., dict]


def train(
    config: ExperimentConfig,
    *,
    workdir: str | Path,
    validate: Validate | None = None,
    profile_steps: int = 0,
    start_from: Callable[[], setup.Change] | None = None,
) -> TrainState:
    """Train the config's network, or continue training, and return the last state.

    Args:
        config: of the experiment.
        workdir: folder of the run, made if missing; see `training.workdir`.
        validate: as `evaluation.validation.validate`; returns {"dice": ...} and perhaps
            {"groups": {name: ...}, "pictures": {name: uint8 [H, W, 3]}}. All processes
            call it, and `predict` uses this process's devices.
        profile_steps: steps to trace to <workdir>/profile.
        start_from: called only for a new run. It returns a function that changes the
            network's parameters before the first step; that function's result is
            logged.

    Raises:
        UserError: before anything is compiled, for impossible configs, missing data,
            and a workdir that is in use or belongs to another run; then for a step that
            does not fit into memory; later for bad files, labels unknown to the
            network, failed writes of checkpoints, and losses that are not finite.
        Interrupted: after SIGTERM, SIGUSR1 or SIGINT, once the state is saved.
    """
    checks.require(
        not jax.config.values["jax_enable_x64"],
        "JAX_ENABLE_X64 is set, but networks are trained in float32; unset it.",
    )
    training, num_classes = config.training, config.model.out_channels
    mesh = processes.run_on_all(lambda: sharding.make_mesh(config.mesh))
    if training.deterministic:
        platform = mesh.devices.flat[0].platform
        processes.run_on_all(lambda: xla_flags.require_deterministic(platform))
    settled = config.data.on_devices(mesh.size)
    processes.run_on_all(
        lambda: sharding.require_divisible(
            mesh, batch_size=settled.batch_size, accumulate=training.accumulate
        )
    )
    data, cases, held_out = processes.run_on_all(
        lambda: setup.find_cases(
            settled, num_classes=num_classes, validated=validate is not None
        )
    )
    fingerprint = data.seen.fingerprint
    setup.require_same_data(
        *(cases, held_out),
        classes=data.class_names,
        groups=data.seen.groups,
        spacing=data.spacing,
    )
    config = dataclasses.replace(config, data=data)
    validate = validate if held_out else None
    held_out = held_out[: training.eval_cases or None]
    with locked(workdir):
        config, changed = continued(workdir, config)
        workdir = open_workdir(workdir, config)
        abstract, start, step_of, predict = setup.make_network(
            config.model, config.optimizer, training, mesh=mesh
        )
        remedies = memory.remedies(
            memory.what_helps(
                config.model,
                data,
                accumulate=training.accumulate,
                devices=mesh.size,
                expert=config.mesh.expert,
            )
        )
        scored_on = pipeline.fingerprint(held_out)
        with (
            requeued(workdir),
            open_checkpoints(workdir, cases=scored_on) as checkpoints,
            remedies,
        ):
            origin = origin_of(config, data=fingerprint)
            state = checkpoints.restore_latest(abstract, origin=origin)
            done = 0 if state is None else int(state.step)
            folder = workdir / CHECKPOINTS / str(done)
            crops = processes.run_on_all(lambda: crops_until(folder)) if done else 0
            origin[AHEAD] = ahead = crops - done * data.batch_size
            stop = training.num_steps
            _announce(workdir, mesh, abstract, cases=len(cases), done=done, stop=stop)
            ended = done == stop and (validate is None or checkpoints.is_scored(done))
            if state is not None and (done > stop or ended):
                return state
            change = setup.read_start(start_from, resumed=state is not None)
            facts = {
                "mesh": dict(mesh.shape),
                "data": fingerprint,
                "first_step": done + 1,
                "first_crop": crops + 1,
                "trained_on": setup.trained_on(data, cases),
                "changed": changed,
            }
            if state is None:
                names = data.class_names
                processes.run_on_all(lambda: config.model.check_classes(names))
            processes.run_on_all(lambda: record.add_start(workdir, facts))
            if state is None:
                state = start(change)
            if validate:
                validate = functools.partial(
                    validate,
                    cases=held_out,
                    data=data,
                    inference=config.inference,
                    num_classes=num_classes,
                )
                validate = functools.partial(
                    setup.validate_on, sharding.local_mesh(mesh), validate, predict
                )
            return _take_steps(
                _Run(workdir, training, checkpoints, origin, validate, abstract),
                state,
                batches=setup.batches_after(
                    done,
                    data,
                    cases,
                    seed=training.seed,
                    num_classes=num_classes,
                    mesh=mesh,
                    ahead=ahead,
                ),
                compile_step=functools.partial(
                    remat.compile_step,
                    step_of,
                    model=config.model,
                    data=data,
                    loss=losses.make(training.loss),
                    accumulate=training.accumulate,
                    deterministic=training.deterministic,
                    mesh=mesh,
                ),
                profile_steps=profile_steps,
            )


@dataclass(frozen=True)
class _Run:
    """Everything that stays the same from step to step.

    Attributes:
        validate: from (parameters, poll) to the result of `train`'s `validate`; an
            exception of `poll` ends it early. None skips validation.
        abstract: shapes and shardings of the state.
    """

    workdir: Path
    training: TrainingConfig
    checkpoints: Checkpoints
    origin: dict
    validate: Callable[[dict, Callable[[], None]], dict] | None
    abstract: TrainState

    def due(self, step: int, every: int) -> bool:
        """Whether something is due after this step; after the last it always is."""
        return step == self.training.num_steps or (every > 0 and step % every == 0)

    def validates(self, step: int) -> bool:
        """Whether the state after this step is validated."""
        return self.validate is not None and self.due(step, self.training.eval_every)

    def save(self, state: TrainState) -> None:
        """Write the state in the background."""
        self.checkpoints.save(state, origin=self.origin)


def _take_steps(run, state, *, batches, compile_step, profile_steps):
    """Take the remaining steps and return the last state.

    A step is saved before it is validated. If its validation was cut short, the next
    run validates first.
    """
    start, stop = int(state.step), run.training.num_steps
    with (
        signals.listening() as listener,
        contextlib.closing(batches),
        open_log(run.workdir, start=start, stop=stop) as log,
        Profile(
            run.workdir, steps=profile_steps, first=start + 1, stop=stop
        ) as profile,
    ):
        if run.validate is not None:
            _score_anew(run, log, listener, state)
        if start and run.validates(start) and not run.checkpoints.is_scored(start):
            _validate(run, log, listener, state, {})
        if start == stop:
            return state
        batch, names = _next(run, batches, state)
        with by_platform.noting() as attention:
            train_step, step_cost, chosen = compile_step(state, batch)
        log.say("attention: %s", by_platform.described(attention))
        processes.on_first(lambda: record.add(run.workdir, {"attention": attention}))
        if chosen is not None:
            log.say("remat: %s", chosen)
            processes.on_first(
                lambda: record.add(run.workdir, {"remat": dataclasses.asdict(chosen)})
            )
        log.say("%s", step_cost)
        cost.require_fit(step_cost)
        clock = Clock(len(names) * jax.process_count(), step_cost)
        running = None  # the step whose metrics have not been fetched
        for step in range(start + 1, stop + 1):
            # Step.
            with profile.step(step):
                state, metrics = train_step(state, batch)
            profile.ended(step, metrics)

            # Record the step before, while this one runs.
            if running:
                _record(run, log, running[0], _fetch(run, log, clock, state, *running))
            running = step, metrics, names

            # Save.
            signal, validates = listener.heard(step), run.validates(step)
            if signal or validates or run.due(step, run.training.checkpoint_every):
                values, running = _fetch(run, log, clock, state, *running), None
                if signal or not validates:  # else with the validation's scores
                    _record(run, log, step, values)
                run.save(state)

            # Validate.
            if validates and not signal:
                _validate(run, log, listener, state, values)

            # Stop.
            if signal and (validates or step < stop):
                run.checkpoints.wait()
                raise Interrupted(signal, step=step, stop=stop)
            run.checkpoints.check()

            # Next.
            if running is None:
                clock.restart()
            if step < stop:
                with clock.waiting():
                    batch, names = _next(run, batches, state)
        run.checkpoints.wait()  # while signals are heard
    return state


def _next(run, batches, state):
    """Return the next batch and the names of its cases; save the state if it is bad."""
    try:
        return next(batches)
    except checks.UserError as error:
        if jax.process_count() == 1 and int(state.step):  # else others had to help
            _save_now(run, state)
            error.args = (f"{error} The state after step {state.step} is saved.",)
        raise


def _save_now(run, state):
    if int(state.step) not in run.checkpoints.steps():
        run.save(state)
    run.checkpoints.wait()


def _fetch(run, log, clock, state, step, metrics, names):
    """Bring a step's metrics to the host; warn if the step was left out."""
    values = {name: float(value) for name, value in jax.device_get(metrics).items()}
    if values["skipped_in_row"]:
        _tell_skipped(run, log, state, step, values, names)
    values |= clock.tick()
    log.progress(values)
    return values


def _record(run, log, step, values):
    """Write a row of metrics, if one is due after this step."""
    if values and (run.due(step, run.training.log_every) or run.validates(step)):
        try:
            log.row(step, values)
        except OSError as error:
            with contextlib.suppress(checks.UserError):
                run.checkpoints.wait()  # the one being written may still find room
            raise checks.UserError(
                f"{run.workdir / logs.FILE} cannot be written: {error.strerror}. "
                f"{run.checkpoints.intact()} Make room, and give the same command "
                "again."
            ) from error


def _tell_skipped(run, log, state, step, values, names):
    """Warn of a step without an update; after many in a row save and end the run."""
    names = [name for part in processes.gather(names) for name in part]
    what = (
        f"step {step}, on crops of {', '.join(names)}: the loss is {values['loss']:g} "
        f"and the norm of its gradient {values['grad_norm']:g}"
    )
    total, in_row = int(values["skipped"]), int(values["skipped_in_row"])
    if in_row < run.training.max_skipped:
        log.say(
            "%s; left out (%d so far, %d in a row)",
            *(what, total, in_row),
            level=logging.WARNING,
        )
        return
    saved = [number for number in run.checkpoints.steps() if number <= step - in_row]
    latest = f"the checkpoint of step {saved[-1]} is" if saved else "no checkpoint is"
    _save_now(run, state)
    raise processes.SharedError(
        f"{what}, and {in_row} steps in a row were skipped (training.max_skipped). "
        f"The parameters are those after step {step - in_row}, now saved as step "
        f"{int(state.step)}; {latest} from before. Start again in a new --workdir, "
        f"from them with --start_from={run.workdir}, with a lower "
        "optimizer.learning_rate or more optimizer.warmup_steps, or look at these "
        "cases."
    )


def _score_anew(run, log, listener, state):
    """Score again steps that were scored on other cases, since Dice do not compare."""
    for step in run.checkpoints.scored_elsewhere():
        log.say(
            "the validation cases are others than those that step %d was scored on; it "
            "is scored again",
            step,
            level=logging.WARNING,
        )
        scored = state
        if step != int(state.step):
            scored = run.checkpoints.restore(step, run.abstract, origin=run.origin)
        _validate(run, log, listener, scored, {})


def _validate(run, log, listener, state, values):
    """Score a state that is being saved, and record the score with the step."""
    step = int(state.step)
    poll = functools.partial(listener.poll, step, run.training.num_steps)
    try:
        result = run.validate(state.evaluated_params, poll)
    except Interrupted:
        _record(run, log, step, values)
        run.checkpoints.wait()
        raise
    groups = {f"{METRIC}/{name}": v for name, v in result.get("groups", {}).items()}
    log.say("step %d: validation Dice %.4f", step, result["dice"])
    _record(run, log, step, values | {METRIC: result["dice"]} | groups)
    log.pictures(step, result.get("pictures", {}))
    run.checkpoints.score(step, result["dice"])


def _announce(workdir, mesh, abstract, *, cases, done, stop):
    parameters = sum(leaf.size for leaf in jax.tree.leaves(abstract.params))
    device = mesh.devices.flat[0].device_kind
    axes = " x ".join(f"{name} {size}" for name, size in mesh.shape.items())
    logging.info("workdir %s", workdir)
    logging.info(
        "network of %s parameters, %d training cases", f"{parameters:,}", cases
    )
    logging.info("%d devices (%s), mesh %s", mesh.size, device, axes)
    if flags := os.environ.get(xla_flags.VARIABLE):
        logging.info("%s=%s", xla_flags.VARIABLE, flags)
    if done >= stop:
        what = f"all {stop} steps are done; a larger training.num_steps continues"
    elif done:
        what = f"continuing after step {done} of {stop}"
    else:
        what = f"{stop} steps; the first one compiles, which takes a while"
    logging.info("%s", what)
