"""Preparation of a run: its cases, network, validation and batches."""

import contextlib
import dataclasses
from collections.abc import Callable, Iterator

import jax
import numpy as np
from absl import logging
from flax import nnx
from jax.sharding import Mesh

from swinsmt_jax import checks, sharding
from swinsmt_jax.config import DataConfig, OptimizerConfig, TrainingConfig
from swinsmt_jax.data import pipeline
from swinsmt_jax.data.meta import EmptySplitError
from swinsmt_jax.data.pipeline import Cases
from swinsmt_jax.labels import IGNORED
from swinsmt_jax.models import abstract_model
from swinsmt_jax.models.registry import NetworkConfig
from swinsmt_jax.runtime import processes
from swinsmt_jax.training import losses
from swinsmt_jax.training.optimizer import (
    make_optimizer,
    make_schedule,
    require_effect,
)
from swinsmt_jax.training.state import abstract_state, changed, initialize
from swinsmt_jax.training.step import TrainStep, make_predict, make_train_step

Change = Callable[[nnx.Module], object]


def find_cases(
    data: DataConfig, *, num_classes: int, validated: bool
) -> tuple[DataConfig, Cases, Cases]:
    """Return the config with facts from its data, and the cases of both splits.

    If the split "val" has no cases, nothing is validated, and the log says so.

    Raises:
        UserError: as `pipeline.settled` and `pipeline.find_cases`.
    """
    data = pipeline.settled(data, num_classes=num_classes)
    cases = pipeline.find_cases(data, split="train")
    groups = pipeline.class_map(data)
    data = dataclasses.replace(data, seen=pipeline.seen(data, cases, groups=groups))
    if not validated:
        return data, cases, ()
    try:
        return data, cases, pipeline.find_cases(data, split="val")
    except EmptySplitError as error:
        if processes.is_first():
            logging.warning(
                "%s Nothing is validated, so there is no best checkpoint and the "
                "latest is used; give a case the split 'val' to change that.",
                error,
            )
        return data, cases, ()


def require_same_data(training: Cases, validation: Cases, **facts: object) -> None:
    """Raise `SharedError` unless all processes have the same cases and these facts."""
    if jax.process_count() == 1:
        return

    def digests():
        both = {"training": training, "validation": validation}
        return {
            f"the fingerprint of the {name} cases": pipeline.fingerprint(
                own, whole=True
            )
            for name, own in both.items()
        }

    facts = {f"the data's {name}": value for name, value in facts.items()}
    processes.require_same(processes.run_on_all(digests) | facts)


def trained_on(data: DataConfig, cases: Cases) -> dict:
    """Return the record of the data for run.json."""
    known = (
        "root",
        "fold",
        "spacing",
        "orientation",
        "modality",
        "hu_range",
        "normalization",
        "classes",
    )
    facts = {name: getattr(data, name) for name in known}
    return facts | {"cases": len(cases), **dataclasses.asdict(data.seen)}


def make_network(
    model: NetworkConfig,
    optimizer_config: OptimizerConfig,
    training: TrainingConfig,
    *,
    mesh: Mesh,
) -> tuple:
    """Return (abstract state, its initialisation, `step_of`, prediction).

    `step_of` makes the training step of a config that may differ in `remat` only. The
    initialisation takes None, or a function that sets other parameters; see
    `state.changed`. Nothing takes memory yet. An unknown loss or frozen parameter is a
    `UserError`.
    """
    schedule = make_schedule(optimizer_config, num_steps=training.num_steps)
    optimizer = make_optimizer(optimizer_config, schedule, network=model)
    graphdef, abstract = abstract_state(
        model, optimizer, mesh=mesh, averaged=training.ema_decay > 0
    )
    require_effect(optimizer_config, abstract.params)
    loss = losses.make(training.loss)

    def step_of(network: NetworkConfig) -> TrainStep:
        same = network == model
        return make_train_step(
            graphdef if same else abstract_model(network)[0],
            optimizer,
            loss=loss,
            schedule=schedule,
            seed=training.seed,
            abstract=abstract,
            mesh=mesh,
            accumulate=training.accumulate,
            ema_decay=training.ema_decay,
            deterministic=training.deterministic,
        )

    def start(change):
        state = initialize(model, optimizer, seed=training.seed, abstract=abstract)
        return state if change is None else changed(state, graphdef, change)

    predict = make_predict(graphdef, abstract=abstract, mesh=sharding.local_mesh(mesh))
    return abstract, start, step_of, predict


def validate_on(
    mesh: Mesh, validate: Callable, predict: Callable, params: dict, poll: Callable
) -> dict:
    """Validate parameters on a local mesh; `poll()` is called before each batch."""
    params = sharding.copy_to_local(params, mesh=mesh)

    def predict_or_stop(windows):
        poll()
        return predict(params, windows)

    return validate(predict_or_stop, sharding=sharding.batch_sharding(mesh))


def read_start(
    start_from: Callable[[], Change] | None, *, resumed: bool
) -> Change | None:
    """Read the start of a new run; a continued run has its own."""
    if start_from is None:
        return None
    if resumed:
        if processes.is_first():
            logging.warning("--start_from is ignored, since the run continues")
        return None
    return processes.run_on_all(start_from)


def batches_after(
    step: int,
    data: DataConfig,
    cases: Cases,
    *,
    seed: int,
    num_classes: int,
    mesh: Mesh,
    ahead: int = 0,
) -> Iterator[tuple[dict[str, jax.Array], list[str]]]:
    """Yield each batch after a step, placed on the mesh, and its cases' names.

    `ahead` is as in `pipeline.training_batches`.

    Raises:
        UserError: for bad files, and labels for which the network has no output.
    """
    batches = pipeline.training_batches(
        data,
        cases,
        seed=seed,
        start_step=step,
        ahead=ahead,
        process_index=jax.process_index(),
        process_count=jax.process_count(),
    )
    with contextlib.closing(batches):
        for batch in batches:
            names = [cases[i].name for i in batch["case"]]
            labels = batch["label"]
            if "annotated" in batch:
                labels = np.where(labels == IGNORED, 0, labels)
            _require_known_labels(labels, names, num_classes)
            yield sharding.place_batch(batch, mesh), names


def _require_known_labels(labels, names, num_classes):
    for name, top in zip(names, labels.max(axis=(1, 2, 3)), strict=True):
        checks.require(
            top < num_classes,
            f"case {name!r} holds label {top}, but model.out_channels is "
            f"{num_classes}, background included, so labels end at {num_classes - 1}.",
        )
