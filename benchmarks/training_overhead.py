"""What logging, checks and checkpoints cost a training step.

    python -m benchmarks.training_overhead [--quick] [--json=FILE] [--root=FOLDER]

The demo's network is trained by `training.loop` with a row of metrics for each step,
and by the bare step on the same stream of crops, in turns. Where cores are shared with
other machines, a run is several per cent slower than the next, so steps are compared
with their like: logging is the difference of the lower quartiles of all steps but those
in which a checkpoint is written; a checkpoint is what the steps after it take longer
than those around them. `overhead_percent` is of both at the rhythm of configs/demo.py,
a checkpoint every 200 steps.
"""

import dataclasses
import json
import logging
import statistics
import tempfile
import time
from pathlib import Path
from unittest import mock

import jax
import numpy as np
from absl import app, flags

from benchmarks import define_file, report, write
from configs import demo
from swinsmt_jax import sharding
from swinsmt_jax.config import from_config_dict
from swinsmt_jax.data import pipeline
from swinsmt_jax.data.layouts import totalsegmentator
from swinsmt_jax.phantoms import dataset as phantom
from swinsmt_jax.runtime import startup
from swinsmt_jax.training import loop, losses
from swinsmt_jax.training.optimizer import make_optimizer, make_schedule
from swinsmt_jax.training.state import abstract_state, initialize
from swinsmt_jax.training.step import make_train_step


def experiment(root, *, steps, checkpoint_every):
    values = demo.get_config()
    values.data.root = str(root)
    values.training.update({"num_steps": steps, "log_every": 1})
    values.training.checkpoint_every = checkpoint_every
    values.optimizer.warmup_steps = 1
    return from_config_dict(values)


def stamped(batches, stamps):
    """Yield batches, and note the seconds when each is asked for."""
    try:
        for batch in batches:
            stamps.append(time.perf_counter())
            yield batch
    finally:
        batches.close()


def run_bare(config, stamps):
    """Train with nothing but data and updates."""
    mesh = sharding.make_mesh(config.mesh)
    schedule = make_schedule(config.optimizer, num_steps=config.training.num_steps)
    optimizer = make_optimizer(config.optimizer, schedule, network=config.model)
    graphdef, abstract = abstract_state(config.model, optimizer, mesh=mesh)
    step = make_train_step(
        graphdef,
        optimizer,
        loss=losses.make("dice_ce"),
        schedule=schedule,
        seed=config.training.seed,
        abstract=abstract,
        mesh=mesh,
    )
    state = initialize(config.model, optimizer, seed=0, abstract=abstract)
    cases = totalsegmentator.find_cases(config.data.root, split="train")
    found = pipeline.training_batches(config.data, cases, seed=config.training.seed)
    batches, before = stamped(found, stamps), None
    for _ in range(config.training.num_steps):
        state, metrics = step(state, sharding.place_batch(next(batches), mesh))
        jax.block_until_ready(before)  # as the loop, be one step ahead
        before = metrics
    batches.close()


def run_full(config, stamps):
    """Train with everything."""
    batches = pipeline.training_batches
    with (
        tempfile.TemporaryDirectory() as folder,
        mock.patch.object(
            pipeline,
            "training_batches",
            lambda *args, **options: stamped(batches(*args, **options), stamps),
        ),
    ):
        loop.train(config, workdir=Path(folder) / "run")


def seconds_of_steps(run, root, *, steps, every):
    """Return the seconds of each step of a run; the last one is not complete."""
    stamps = []
    run(experiment(root, steps=steps + 1, checkpoint_every=every), stamps)
    return list(np.diff(stamps))


def without_checkpoints(seconds, *, every, writing):
    """Return the steps but the first ones that no checkpoint is written in."""
    return [
        s for i, s in enumerate(seconds) if i >= every // 2 and i % every >= writing
    ]


def checkpoint_costs(seconds, *, every, writing):
    """Return what the steps after each checkpoint take longer than their neighbours."""
    costs = []
    for saved in range(every, len(seconds) - 2 * writing + 1, every):
        during, after = (seconds[saved + i * writing :][:writing] for i in (0, 1))
        before = seconds[saved - writing : saved]
        costs.append(sum(during) - writing * statistics.median(before + after))
    return costs


@startup.exit_on_user_error("training_overhead")
def main(_):
    options = flags.FLAGS
    startup.start()
    logging.disable(logging.INFO)
    steps, every, writing = (16, 6, 2) if options.quick else (130, 50, 12)
    rhythm = {"every": every, "writing": writing}
    times = {"bare": [], "full": []}
    with tempfile.TemporaryDirectory() as folder:
        root = options.root or Path(folder) / "phantoms"
        if not options.root:
            phantom.write_dataset(root, train=4, val=1, test=1, spacing=12.0, seed=0)
        for run in (run_bare, run_full):  # compiles
            run(experiment(root, steps=2, checkpoint_every=2), [])
        for _ in range(1 if options.quick else options.rounds):
            for name, run in (("bare", run_bare), ("full", run_full)):
                found = seconds_of_steps(run, root, steps=steps, every=every)
                times[name].append(found)
                print(
                    f"{name}: median {statistics.median(found):.4f} s/step", flush=True
                )
    bare, logged = (
        np.quantile([x for t in of for x in without_checkpoints(t, **rhythm)], 0.25)
        for of in times.values()
    )
    costs = [c for t in times["full"] for c in checkpoint_costs(t, **rhythm)]
    checkpoint = statistics.median(costs)
    usual = demo.get_config().training.checkpoint_every
    headline = {
        "bare_step_s": float(bare),
        "logging_percent": float(100 * (logged / bare - 1)),
        "checkpoint_s": float(checkpoint),
        "checkpoint_every": usual,
        "overhead_percent": float(100 * (logged - bare + checkpoint / usual) / bare),
    }
    print(json.dumps(headline, indent=1))
    model = experiment(root, steps=steps, checkpoint_every=every).model
    found = report(headline, seconds_of_steps=times, model=dataclasses.asdict(model))
    write(options.json, found)


if __name__ == "__main__":
    flags.DEFINE_bool("quick", False, "few steps, to see that it works")
    define_file("json", "also write the figures to this file")
    flags.DEFINE_string("root", None, "dataset; by default six phantoms are made")
    flags.DEFINE_integer("rounds", 3, "turns of each")
    app.run(main)
