"""Training: from a config and a workdir to a trained network.

A run is a pure function of its config: started again, it continues from its latest
checkpoint with the data and the keys that it would have had.
"""

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import jax
import jax.numpy as jnp
from absl import logging
from flax import nnx

from swinsmt_jax import checks, models, sharding
from swinsmt_jax.config import DataConfig, ExperimentConfig, TrainingConfig
from swinsmt_jax.data import pipeline
from swinsmt_jax.data.case import Case
from swinsmt_jax.data.meta import EmptySplitError
from swinsmt_jax.runtime import cost, interrupts, memory, processes, record
from swinsmt_jax.runtime.profile import Profile
from swinsmt_jax.training import logs, losses
from swinsmt_jax.training.checkpoint import Checkpoints, open_checkpoints, origin_of
from swinsmt_jax.training.checkpoint_folder import METRIC
from swinsmt_jax.training.logs import Clock, open_log
from swinsmt_jax.training.optimizer import (
    make_optimizer,
    make_schedule,
    require_frozen,
    require_stages,
)
from swinsmt_jax.training.state import (
    TrainState,
    abstract_state,
    initialize,
    shardings_of,
)
from swinsmt_jax.training.step import make_predict, make_train_step
from swinsmt_jax.training.workdir import locked, open_workdir

Validate = Callable[..., dict]


def train(
    config: ExperimentConfig,
    *,
    workdir: str | Path,
    validate: Validate | None = None,
    profile_steps: int = 0,
    start_from: Callable[[], Callable[[nnx.Module], object]] | None = None,
) -> TrainState:
    """Train the config's network, or continue, and return the last state.

    Args:
        config: of the experiment.
        workdir: folder of the run, made if missing; see `training.workdir`.
        validate: as `evaluation.run.validate`: called as (predict, config, cases,
            sharding=...), it returns {"dice": ..., "groups": {name: ...}} and perhaps
            {"pictures": {name: uint8 [H, W, 3]}}. Of several processes all call it, and
            `predict` takes this process's devices.
        profile_steps: steps of which a trace is written to <workdir>/profile.
        start_from: called for a new run alone. What it returns changes the parameters
            of the network before the first step; what that returns is logged.

    Raises:
        UserError: before anything is compiled, for impossible configs, missing data
            and a workdir of another run or in use; then for a step that does not fit
            into memory; later for bad files, labels unknown to the network, checkpoints
            that cannot be written, and losses that are not finite.
        Interrupted: after SIGTERM or SIGINT, once the state is saved.
    """
    mesh = sharding.make_mesh(config.mesh)
    sharding.require_divisible(config, mesh)
    checks.require(
        config.model.in_channels == 1,
        f"model.in_channels is {config.model.in_channels}, but a CT has 1 channel.",
    )
    data = processes.together(
        lambda: pipeline.with_classes(
            config.data, num_classes=config.model.out_channels
        )
    )
    config = dataclasses.replace(config, data=data)
    cases, fingerprint = processes.together(lambda: _training_cases(data))
    held_out = ()
    if validate:
        held_out = processes.together(lambda: _validation_cases(data))
    processes.require_same({"the fingerprint of the training cases": fingerprint})
    origin = origin_of(config, data=fingerprint)
    with locked(workdir):
        workdir = open_workdir(workdir, config)
        abstract, start, train_step, predict = _network(
            config.model, config.optimizer, config.training, mesh=mesh
        )
        with (
            open_checkpoints(workdir) as checkpoints,
            memory.remedies(config, devices=mesh.size),
        ):
            state = checkpoints.restore_latest(abstract, origin=origin)
            done = 0 if state is None else int(state.step)
            _announce(workdir, mesh, abstract, cases=len(cases))
            _announce_steps(done, config.training.num_steps)
            if _is_done(config.training, checkpoints, done, validated=bool(validate)):
                return state
            change = _read_start(start_from, resumed=state is not None)
            facts = {"mesh": dict(mesh.shape), "data": fingerprint}
            facts["first_step"] = done + 1
            processes.together(lambda: record.add_start(workdir, facts))
            if state is None:
                state = start(change)
            score = None
            if validate:
                held_out = held_out[: config.training.eval_cases or None]
                score = _scorer(
                    functools.partial(validate, config=config, cases=held_out),
                    predict,
                    mesh=sharding.local_mesh(mesh),
                )
            run = _Run(
                training=config.training,
                workdir=workdir,
                checkpoints=checkpoints,
                origin=origin,
                score=score,
                compile=functools.partial(_compile, config, mesh, train_step),
                batches=functools.partial(
                    _batches,
                    data,
                    cases,
                    num_classes=config.model.out_channels,
                    seed=config.training.seed,
                    mesh=mesh,
                ),
                profile_steps=profile_steps,
            )
            return _take_steps(run, state)


@dataclass(frozen=True)
class _Run:
    """What stays the same from step to step.

    Attributes:
        training: length and rhythm.
        workdir: folder of the run.
        checkpoints: of the run.
        origin: of the checkpoints.
        batches: the first step to its stream of (batch, names of its cases).
        compile: (state, batch) to the compiled step and the clock of its rates.
        score: (parameters, poll) to what `train`'s `validate` returns; what `poll`
            raises ends it early. None validates nothing.
        profile_steps: steps to trace.
    """

    training: TrainingConfig
    workdir: Path
    checkpoints: Checkpoints
    origin: dict
    batches: Callable
    compile: Callable
    score: Callable[[dict, Callable[[], None]], dict] | None
    profile_steps: int

    def due(self, step: int, every: int) -> bool:
        """Whether something happens after this step; it always does after the last."""
        return step == self.training.num_steps or (every > 0 and step % every == 0)

    def validates(self, step: int) -> bool:
        """Whether the state after this step is validated."""
        return self.score is not None and self.due(step, self.training.eval_every)

    def save(self, state: TrainState) -> None:
        """Write the state in the background."""
        self.checkpoints.save(state, origin=self.origin)


def _take_steps(run, state):
    """Take the steps that are left and return the last state.

    A step is saved before it is validated. Where that validation was cut short, it is
    made up for first.
    """
    start, stop = int(state.step), run.training.num_steps
    with (
        interrupts.listening() as listener,
        contextlib.closing(run.batches(start)) as batches,
        open_log(run.workdir, start=start, stop=stop) as log,
        Profile(
            run.workdir, steps=run.profile_steps, first=start + 1, stop=stop
        ) as profile,
    ):
        if start and run.validates(start) and not run.checkpoints.is_scored(start):
            _validate(run, log, listener, state, {})
        if start == stop:
            return state
        batch, names = _next(run, batches, state)
        train_step, clock = run.compile(state, batch)
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
                processes.meet()  # the launcher may end all with the first one
                raise interrupts.Interrupted(signal, step=step, stop=stop)
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
    """Bring a step's metrics to the host; tell of a step that was left out."""
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
    """Warn of a step without an update; save, and end the run, after many in a row."""
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
        f"{what}, and {in_row} steps in a row were left out (training.max_skipped). "
        f"The parameters are those after step {step - in_row}, now saved as step "
        f"{int(state.step)}; {latest} from before. Start again in a new --workdir, "
        f"from them with --start_from={run.workdir}, with a lower "
        "optimizer.learning_rate or more optimizer.warmup_steps, or look at these "
        "cases."
    )


def _validate(run, log, listener, state, values):
    """Score a state that is being saved, and record that with the step's values."""
    step = int(state.step)
    poll = functools.partial(listener.poll, step, run.training.num_steps)
    try:
        result = run.score(state.evaluated_params, poll)
    except interrupts.Interrupted:
        _record(run, log, step, values)
        run.checkpoints.wait()
        raise
    groups = {f"{METRIC}/{name}": v for name, v in result.get("groups", {}).items()}
    log.say("step %d: validation Dice %.4f", step, result["dice"])
    _record(run, log, step, values | {METRIC: result["dice"]} | groups)
    log.pictures(step, result.get("pictures", {}))
    run.checkpoints.score(step, result["dice"])


# What `train` prepares.


def _training_cases(config: DataConfig) -> tuple[Sequence[Case], str]:
    cases = pipeline.find_cases(config, split="train")
    return cases, pipeline.fingerprint(cases)


def _validation_cases(config: DataConfig) -> Sequence[Case]:
    try:
        return pipeline.find_cases(config, split="val")
    except EmptySplitError as error:
        raise EmptySplitError(
            f"{error} Training picks its best checkpoint by them: give at least one "
            "case the split 'val' in meta.csv (and run preprocess.py again for a "
            "store)."
        ) from error


def _network(model, optimizer, training, *, mesh):
    """Return (shapes of the state, its initialisation, update, prediction).

    The first three arguments are the configs of these names.
    """
    schedule = make_schedule(optimizer, num_steps=training.num_steps)
    transformation = make_optimizer(optimizer, schedule)
    graphdef, abstract = abstract_state(
        model, transformation, mesh=mesh, averaged=training.ema_decay > 0
    )
    require_frozen(optimizer, abstract.params)
    require_stages(optimizer, abstract.params)
    train_step = make_train_step(
        graphdef,
        transformation,
        loss=losses.make(training.loss),
        schedule=schedule,
        seed=training.seed,
        abstract=abstract,
        mesh=mesh,
        accumulate=training.accumulate,
        ema_decay=training.ema_decay,
    )

    def start(change):
        state = initialize(model, transformation, seed=training.seed, abstract=abstract)
        return state if change is None else _changed(state, change, graphdef)

    predict = make_predict(graphdef, abstract=abstract, mesh=sharding.local_mesh(mesh))
    return abstract, start, train_step, predict


def _changed(state, change, graphdef):
    """Return the state with the parameters that `change` makes of its network."""
    model = nnx.merge(graphdef, jax.tree.map(jnp.asarray, state.params))
    for line in str(processes.together(lambda: change(model))).splitlines():
        logging.info("%s", line)
    params = jax.device_put(models.split(model)[1], shardings_of(state.params))
    average = jax.tree.map(jnp.copy, params) if state.average else {}
    return dataclasses.replace(state, params=params, average=average)


def _scorer(validate, predict, *, mesh):
    """Return the function from parameters to their validation on a local mesh."""

    def score(params, poll):
        params = sharding.copy_to_local(params, mesh=mesh)

        def predict_or_stop(windows):
            poll()
            return predict(params, windows)

        return validate(predict_or_stop, sharding=sharding.batch_sharding(mesh))

    return score


def _read_start(start_from, *, resumed):
    """Read what a new run starts from; one that continues has its own."""
    if start_from is None:
        return None
    if resumed:
        if processes.is_first():
            logging.warning("--start_from is ignored, since the run continues")
        return None
    return processes.together(start_from)


def _is_done(training, checkpoints, step, *, validated):
    """Whether nothing is left to do after a step."""
    if step == training.num_steps and validated:
        return checkpoints.is_scored(step)
    return step >= training.num_steps


def _batches(data, cases, start, *, num_classes, seed, mesh):
    """Yield each batch after step `start`, on the mesh, and the names of its cases."""
    batches = pipeline.training_batches(
        data,
        cases,
        seed=seed,
        start_step=start,
        process_index=jax.process_index(),
        process_count=jax.process_count(),
    )
    with contextlib.closing(batches):
        for batch in batches:
            names = [cases[i].name for i in batch["case"]]
            _require_known_labels(batch["label"], names, num_classes)
            yield sharding.place_batch(batch, mesh), names


def _require_known_labels(labels, names, num_classes):
    for name, top in zip(names, labels.max(axis=(1, 2, 3)), strict=True):
        checks.require(
            top < num_classes,
            f"case {name!r} holds label {top}, but model.out_channels is "
            f"{num_classes}, background included, so labels end at {num_classes - 1}.",
        )


def _compile(config, mesh, train_step, state, batch):
    """Compile the step, and refuse one that does not fit into memory."""
    compiled = processes.compiled(train_step, state, batch)
    found = cost.measure(config, compiled, mesh=mesh)
    logging.info(
        "a step takes %.4g TFLOP, and on each device %s for state and batch and %s to "
        "compute with",
        found.operations / 1e12,
        memory.gigabytes(found.arguments),
        memory.gigabytes(found.temporaries),
    )
    cost.require_fit(found, config, devices=mesh.size)
    return compiled, Clock(config.data.batch_size, found)


def _announce(workdir, mesh, abstract, *, cases):
    parameters = sum(leaf.size for leaf in jax.tree.leaves(abstract.params))
    device = mesh.devices.flat[0]
    axes = " x ".join(f"{name} {size}" for name, size in mesh.shape.items())
    logging.info("workdir %s", workdir)
    logging.info(
        "network of %s parameters, %d training cases", f"{parameters:,}", cases
    )
    logging.info("%d devices (%s), mesh %s", mesh.size, device.device_kind, axes)


def _announce_steps(done, stop):
    if done >= stop:
        logging.info(
            "all %d steps are done; a larger training.num_steps continues", stop
        )
    elif done:
        logging.info("continuing after step %d of %d", done, stop)
    else:
        logging.info("%d steps; the first one compiles, which takes a while", stop)
