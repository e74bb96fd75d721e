"""Training: from a config and a workdir to a trained network.

A run is a pure function of its config: started again, it continues from its latest
checkpoint with the data and the keys that it would have had.
"""

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
from absl import logging
from flax import nnx
from jax.sharding import Mesh

from swinsmt_jax import checks, sharding
from swinsmt_jax.config import ExperimentConfig
from swinsmt_jax.data import pipeline
from swinsmt_jax.data.case import Case
from swinsmt_jax.models import split
from swinsmt_jax.runtime import memory, processes, record
from swinsmt_jax.training.checkpoint import Origin, open_checkpoints
from swinsmt_jax.training.optimizer import (
    make_optimizer,
    make_schedule,
    require_frozen,
    stages_from_decoder,
)
from swinsmt_jax.training.state import TrainState, blueprint, initialize, shardings_of
from swinsmt_jax.training.step import make_predict, make_train_step
from swinsmt_jax.training.steps import Run, take_steps
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
    mesh = _mesh(config)
    checks.require(
        config.model.in_channels == 1,
        f"model.in_channels is {config.model.in_channels}, but a CT has 1 channel.",
    )
    config = processes.together(lambda: _with_classes(config))
    cases, data = processes.together(lambda: _training_cases(config))
    held_out = ()
    if validate:
        held_out = processes.together(lambda: _validation_cases(config))
    processes.require_same({"the fingerprint of the training cases": data})
    origin = Origin(config, data=data)
    with locked(workdir):
        workdir = open_workdir(workdir, config)
        like, start, train_step, predict = _network(config, mesh)
        with (
            open_checkpoints(workdir) as checkpoints,
            memory.remedies(config, devices=mesh.size),
        ):
            state = checkpoints.restore_latest(like, origin=origin)
            _announce(config, workdir, mesh, like, cases=len(cases), state=state)
            done = 0 if state is None else int(state.step)
            score = None
            if validate:
                score = _scorer(config, mesh, predict, validate, held_out)
            if _is_done(config, checkpoints, done, validated=validate is not None):
                return state
            change = None
            if start_from is not None:
                change = _read_start(start_from, resumed=state is not None)
            facts = {"mesh": dict(mesh.shape), "data": data, "first_step": done + 1}
            processes.together(lambda: record.add_start(workdir, facts))
            run = Run(
                config=config,
                workdir=workdir,
                mesh=mesh,
                cases=tuple(cases),
                origin=origin,
                train_step=train_step,
                score=score,
                checkpoints=checkpoints,
                profile_steps=profile_steps,
            )
            return take_steps(run, start(change) if state is None else state)


def _mesh(config):
    """Make the mesh, and refuse one that the experiment does not fit."""
    expert, count = config.mesh.expert, len(jax.devices())
    checks.require(
        expert <= count,
        f"mesh.expert is {expert}, but there are {count} devices; take one of "
        f"{_listing(_divisors(count))}.",
    )
    mesh = sharding.make_mesh(config.mesh)
    share, rest = divmod(config.data.batch_size, mesh.size)
    checks.require(
        rest > 0 or share % config.training.accumulate == 0,
        f"training.accumulate is {config.training.accumulate}, but must divide the "
        f"{share} samples that each of the {mesh.size} devices has of data.batch_size "
        f"= {config.data.batch_size}: take one of {_listing(_divisors(share))}.",
    )
    sharding.require_divisible(config, mesh)
    return mesh


def _is_done(config, checkpoints, step, *, validated):
    """Whether nothing is left to do after a step."""
    last = config.training.num_steps
    if step == last and validated:
        return checkpoints.is_scored(step)
    return step >= last


def _read_start(start_from, *, resumed):
    """Read what a new run starts from; one that continues has its own."""
    if resumed:
        if processes.is_first():
            logging.warning("--start_from is ignored, since the run continues")
        return None
    return processes.together(start_from)


def _network(config, mesh):
    """Return (blueprint of the state, its initialisation, update, prediction)."""
    training = config.training
    schedule = make_schedule(config.optimizer, num_steps=training.num_steps)
    optimizer = make_optimizer(config.optimizer, schedule)
    graphdef, like = blueprint(
        config.model, optimizer, mesh=mesh, averaged=training.ema_decay > 0
    )
    require_frozen(config.optimizer, like.params)
    _require_stages(config, like.params)
    train_step = make_train_step(
        graphdef,
        optimizer,
        schedule=schedule,
        seed=training.seed,
        like=like,
        mesh=mesh,
        accumulate=training.accumulate,
        ema_decay=training.ema_decay,
    )

    def start(change):
        state = initialize(config.model, optimizer, seed=training.seed, like=like)
        if change is None:
            return state
        model = nnx.merge(graphdef, jax.tree.map(jnp.asarray, state.params))
        for line in str(processes.together(lambda: change(model))).splitlines():
            logging.info("%s", line)
        params = jax.device_put(split(model)[1], shardings_of(like.params))
        average = jax.tree.map(jnp.copy, params) if state.average else {}
        return dataclasses.replace(state, params=params, average=average)

    predict = make_predict(graphdef, like=like, mesh=sharding.local_mesh(mesh))
    return like, start, train_step, predict


def _scorer(config, mesh, predict, validate, cases):
    """Return the function from parameters to their validation."""
    here = sharding.local_mesh(mesh)

    def score(params, poll):
        params = sharding.copy_to_local(params, mesh=here)

        def predict_or_stop(windows):
            poll()
            return predict(params, windows)

        return validate(
            predict_or_stop,
            _filling_devices(config, here),
            cases,
            sharding=sharding.batch_sharding(here),
        )

    return score


def _with_classes(config: ExperimentConfig) -> ExperimentConfig:
    found = pipeline.with_classes(config.data, num_classes=config.model.out_channels)
    return dataclasses.replace(config, data=found)


def _training_cases(config: ExperimentConfig) -> tuple[Sequence[Case], str]:
    cases = pipeline.find_cases(config.data, split="train")
    return cases, pipeline.fingerprint(cases)


def _validation_cases(config: ExperimentConfig) -> Sequence[Case]:
    try:
        cases = pipeline.find_cases(config.data, split="val")
    except checks.UserError as error:
        if "no case of the split" not in str(error):
            raise
        raise checks.UserError(
            f"{error} Training picks its best checkpoint by them: give at least one "
            "case the split 'val' in meta.csv (and run preprocess.py again for a "
            "store)."
        ) from error
    return cases[: config.training.eval_cases or None]


def _require_stages(config, params):
    """Raise `UserError` for a `layer_decay` that no parameter would feel."""
    leaves = jax.tree_util.tree_flatten_with_path(params)[0]
    stages = [stages_from_decoder(sharding.path_name(path)) for path, _ in leaves]
    decay = config.optimizer.layer_decay
    checks.require(
        decay == 1 or any(stages),
        f"optimizer.layer_decay is {decay}, but this network has no stages of a Swin "
        "encoder (swinViT/layers1 to 4), on which alone it acts; leave it at 1.",
    )


def _divisors(number):
    return [n for n in range(1, number + 1) if number % n == 0]


def _listing(numbers):
    return ", ".join(map(str, numbers))


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
