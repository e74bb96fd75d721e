"""The training loop: data in, updates, metrics, validation and checkpoints out.

A run is a pure function of its config: started again, it continues from its latest
checkpoint with the data and the keys that it would have had.
"""

import contextlib
import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from pathlib import Path

import jax
from absl import logging
from jax.sharding import Mesh

from swinsmt_jax import checks, losses, sharding
from swinsmt_jax.config import ExperimentConfig
from swinsmt_jax.data import pipeline, totalsegmentator
from swinsmt_jax.data.totalsegmentator import Case
from swinsmt_jax.training import processes
from swinsmt_jax.training.checkpoint import METRIC, Origin, open_checkpoints
from swinsmt_jax.training.logs import Clock, open_log
from swinsmt_jax.training.optimizer import make_optimizer, make_schedule
from swinsmt_jax.training.state import TrainState, blueprint, initialize
from swinsmt_jax.training.step import make_predict, make_train_step
from swinsmt_jax.training.workdir import open_workdir

Validate = Callable[..., dict]


def train(
    config: ExperimentConfig, *, workdir: str | Path, validate: Validate | None = None
) -> TrainState:
    """Train the config's network, or continue, and return the last state.

    Args:
        config: of the experiment.
        workdir: folder of the run, made if missing; see `training.workdir`.
        validate: as `evaluation.run.validate`: called as (predict, config, cases,
            sharding=...), it returns {"dice": ..., "groups": {name: ...}}. Of several
            processes all call it, and `predict` takes this process's devices.

    Raises:
        UserError: before anything is compiled, for impossible configs, missing data
            and a workdir of another run; later for bad files, labels unknown to the
            network and a loss that is not finite.
    """
    mesh = sharding.make_mesh(config.mesh)
    sharding.require_divisible(config, mesh)
    checks.require(
        config.model.in_channels == 1,
        f"model.in_channels is {config.model.in_channels}, but a CT has 1 channel.",
    )
    held_out = ()
    if validate:
        held_out = processes.together(lambda: _validation_cases(config))
    cases, data = processes.together(lambda: _training_cases(config))
    processes.require_same({"the fingerprint of the training cases": data})
    workdir = open_workdir(workdir, config)
    origin = Origin(config, data=data)

    schedule = make_schedule(config.optimizer, num_steps=config.training.num_steps)
    optimizer = make_optimizer(config.optimizer, schedule)
    graphdef, like = blueprint(config.model, optimizer, mesh=mesh)
    train_step = make_train_step(
        graphdef,
        optimizer,
        schedule=schedule,
        loss_fn=losses.dice_cross_entropy,
        seed=config.training.seed,
        like=like,
        mesh=mesh,
    )
    here = sharding.local_mesh(mesh)
    predict = make_predict(graphdef, like=like, mesh=here)

    def score(params):
        params = sharding.copy_to_local(params, mesh=here)
        return validate(
            lambda windows: predict(params, windows),
            _filling_devices(config, here),
            held_out,
            sharding=sharding.batch_sharding(here),
        )

    with open_checkpoints(workdir) as checkpoints:
        state = checkpoints.restore_latest(like, origin=origin)
        _announce(config, workdir, mesh, like, cases=len(cases), state=state)
        if state is None:
            state = initialize(
                config.model, optimizer, seed=config.training.seed, like=like
            )
        return _run(
            config,
            state,
            train_step=train_step,
            score=score if validate else None,
            save=functools.partial(checkpoints.save, origin=origin),
            cases=cases,
            mesh=mesh,
            workdir=workdir,
        )


def _run(config, state, *, train_step, score, save, cases, mesh, workdir):
    """Take the steps that are left."""
    training = config.training
    start, stop = int(state.step), training.num_steps
    if start >= stop:
        return state
    clock = Clock(config.data.batch_size)
    with (
        _batches(config, cases, start=start) as batches,
        open_log(workdir, start=start, stop=stop) as log,
    ):
        pending = None  # the step before: its metrics are fetched while this one runs
        for step in range(start + 1, stop + 1):
            batch = next(batches)
            names = [cases[i].name for i in batch["case"]]
            _require_known_labels(batch, names, config.model.out_channels)
            batch = sharding.place_batch(batch, mesh)
            if step == start + 1:
                train_step = processes.compiled(train_step, state, batch)
            state, metrics = train_step(state, batch)
            if pending:
                _record(log, pending[0], _fetch(*pending) | clock.tick(), config)
            pending = step, metrics, names
            validates = score is not None and _due(step, training.eval_every, stop)
            if validates or _due(step, training.checkpoint_every, stop):
                values = _fetch(*pending) | clock.tick()
                scores = _scores(score(state.params)) if validates else {}
                _record(log, step, values | scores, config)
                save(state, dice=scores.get(METRIC))
                pending = None
                clock.restart()
    return state


def _record(log, step, values, config):
    if log is None:
        return
    log.progress(values)
    if METRIC in values:
        log.say("step %d: validation Dice %.4f", step, values[METRIC])
    every, stop = config.training.log_every, config.training.num_steps
    if METRIC in values or _due(step, every, stop):
        log.row(step, values)


def _due(step, every, last):
    """Whether something happens after this step; it always does after the last."""
    return step == last or (every > 0 and step % every == 0)


def _fetch(step, metrics, names):
    """Bring metrics to the host; refuse to go on from a loss that is not finite."""
    values = {name: float(value) for name, value in jax.device_get(metrics).items()}
    if all(math.isfinite(value) for value in values.values()):
        return values
    names = processes.gather(names)  # the metrics, so all processes come here
    names = [name for part in names for name in part]
    raise processes.SharedError(
        f"step {step}, on crops of {', '.join(names)}: the loss is {values['loss']:g} "
        f"and the norm of its gradient {values['grad_norm']:g}. Training cannot go on "
        "from there; the latest checkpoint is from before. Start again in a new "
        "--workdir with a lower optimizer.learning_rate or more "
        "optimizer.warmup_steps.",
    )


def _scores(result):
    """Flatten what `validate` returned to the names of the metrics."""
    groups = {f"{METRIC}/{name}": v for name, v in result.get("groups", {}).items()}
    return {METRIC: result["dice"], **groups}


@contextlib.contextmanager
def _batches(config, cases, *, start):
    batches = pipeline.training_batches(
        config.data,
        cases,
        seed=config.training.seed,
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


def _training_cases(config: ExperimentConfig) -> tuple[Sequence[Case], str]:
    cases = totalsegmentator.find_cases(config.data.root, split="train")
    return cases, pipeline.fingerprint(cases)


def _validation_cases(config: ExperimentConfig) -> Sequence[Case]:
    cases = totalsegmentator.find_cases(config.data.root, split="val")
    return cases[: config.training.eval_cases or None]


def _filling_devices(config: ExperimentConfig, mesh: Mesh) -> ExperimentConfig:
    """Enlarge the batch of windows to a multiple of the devices."""
    batch = -(-config.inference.window_batch // mesh.size) * mesh.size
    inference = dataclasses.replace(config.inference, window_batch=batch)
    return dataclasses.replace(config, inference=inference)


def _announce(config, workdir, mesh, like, *, cases, state):
    parameters = sum(leaf.size for leaf in jax.tree.leaves(like.params))
    device = mesh.devices.flat[0]
    axes = " x ".join(f"{name} {size}" for name, size in mesh.shape.items())
    done, stop = 0 if state is None else int(state.step), config.training.num_steps
    logging.info("workdir %s", workdir)
    logging.info(
        "network of %s parameters, %d training cases", f"{parameters:,}", cases
    )
    logging.info("%d devices (%s), mesh %s", mesh.size, device.device_kind, axes)
    if done >= stop:
        logging.info(
            "all %d steps are done; a larger training.num_steps continues", stop
        )
    elif done:
        logging.info("continuing after step %d of %d", done, stop)
    else:
        logging.info("%d steps; the first one compiles, which takes a while", stop)
