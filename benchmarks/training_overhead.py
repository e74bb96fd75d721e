"""What logging, checks and checkpoints cost a training step.

    python -m benchmarks.training_overhead [--quick] [--json=FILE] [--root=FOLDER]

The demo's network is trained by `training.loop` with a row of metrics for each step and
a checkpoint every 25 steps, and by the bare step on the same stream of crops. Each is
run with few and with many steps, and the difference is divided by the steps between, so
that start, compilation and end cancel. They take turns, and the fastest rounds are
compared: what else goes on in the machine only adds time, by several per cent.
"""

import dataclasses
import json
import logging
import tempfile
import time
from pathlib import Path

import jax
from absl import app, flags

from benchmarks import define_file, report, write
from configs import demo
from swinsmt_jax import losses, sharding
from swinsmt_jax.config import from_config_dict
from swinsmt_jax.data import phantom, pipeline, totalsegmentator
from swinsmt_jax.training import loop, startup
from swinsmt_jax.training.optimizer import make_optimizer, make_schedule
from swinsmt_jax.training.state import blueprint, initialize
from swinsmt_jax.training.step import make_train_step


def experiment(root, *, steps, checkpoint_every):
    values = demo.get_config()
    values.data.root = str(root)
    values.training.update({"num_steps": steps, "log_every": 1})
    values.training.checkpoint_every = checkpoint_every
    values.optimizer.warmup_steps = 1
    return from_config_dict(values)


def time_bare(config):
    """Return the seconds of all steps, with nothing but data and updates."""
    start = time.perf_counter()
    mesh = sharding.make_mesh(config.mesh)
    schedule = make_schedule(config.optimizer, num_steps=config.training.num_steps)
    optimizer = make_optimizer(config.optimizer, schedule)
    graphdef, like = blueprint(config.model, optimizer, mesh=mesh)
    step = make_train_step(
        graphdef,
        optimizer,
        schedule=schedule,
        loss_fn=losses.dice_cross_entropy,
        seed=config.training.seed,
        like=like,
        mesh=mesh,
    )
    state = initialize(config.model, optimizer, seed=0, like=like)
    cases = totalsegmentator.find_cases(config.data.root, split="train")
    batches = pipeline.training_batches(config.data, cases, seed=config.training.seed)
    for _ in range(config.training.num_steps):
        state, _ = step(state, sharding.place_batch(next(batches), mesh))
    jax.block_until_ready(state)
    batches.close()
    return time.perf_counter() - start


def time_full(config):
    """Return the seconds of a run with everything."""
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        loop.train(config, workdir=Path(folder) / "run")
        return time.perf_counter() - start


def seconds_per_step(run, root, *, few, many, checkpoint_every):
    def timed(steps):
        return run(experiment(root, steps=steps, checkpoint_every=checkpoint_every))

    first = timed(few)
    return (timed(many) - first) / (many - few)


@startup.exit_on_user_error("training_overhead")
def main(_):
    options = flags.FLAGS
    startup.start()
    logging.disable(logging.INFO)
    few, many, every = (3, 8, 3) if options.quick else (25, 75, 25)
    times = {"bare": [], "full": []}
    with tempfile.TemporaryDirectory() as folder:
        root = options.root or Path(folder) / "phantoms"
        if not options.root:
            phantom.write_dataset(root, train=4, val=1, test=1, spacing=12.0, seed=0)
        for run in (time_bare, time_full):  # compiles
            run(experiment(root, steps=2, checkpoint_every=2))
        for _ in range(1 if options.quick else options.rounds):
            for name, run in (("bare", time_bare), ("full", time_full)):
                found = seconds_per_step(
                    run, root, few=few, many=many, checkpoint_every=every
                )
                times[name].append(found)
                print(f"{name}: {found:.4f} s/step", flush=True)
    bare, full = (min(times[name]) for name in ("bare", "full"))
    headline = {
        "bare_s": bare,
        "full_s": full,
        "overhead_percent": 100 * (full / bare - 1),
    }
    print(json.dumps(headline, indent=1))
    model = experiment(root, steps=many, checkpoint_every=every).model
    found = report(headline, rounds=times, model=dataclasses.asdict(model))
    write(options.json, found)


if __name__ == "__main__":
    flags.DEFINE_bool("quick", False, "few steps, to see that it works")
    define_file("json", "also write the figures to this file")
    flags.DEFINE_string("root", None, "dataset; by default six phantoms are made")
    flags.DEFINE_integer("rounds", 5, "turns of each")
    app.run(main)
