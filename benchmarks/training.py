"""Cost of a run beyond its steps, and whether a killed run ends as it should.

    python -m benchmarks.training [--quick] [--rounds=3] [--root=FOLDER] [--json=FILE]
    python -m benchmarks.training --killed [--quick] [--folder=F] [--seed=0]
        [--json=FILE]

The demo's network is trained by `training.loop` with a row of metrics for each step,
and by the bare step on the same stream of crops, in turns. Where cores are shared with
other machines, a run is several per cent slower than the next, so steps are compared
with their like: logging is the difference of the lower quartiles of all steps but those
in which a checkpoint is written; a checkpoint is what the steps after it take longer
than those around them. `overhead_percent` is of both at the rhythm of configs/demo.py,
a checkpoint every 200 steps.

--killed trains configs/demo.py by train.py undisturbed, and again killed twice with
SIGKILL at random moments and resumed by the same command; then evaluates both on the
test split. Printed are both Dice tables, and whether they and the final parameters are
identical. --quick takes few steps of small patches.
"""

import dataclasses
import json
import logging
import random
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from unittest import mock

import jax
import numpy as np
from absl import flags
from flax import nnx

from benchmarks import ROOT, programs, run, save, show
from swinsmt_jax import sharding
from swinsmt_jax.config import from_config_dict
from swinsmt_jax.configs import demo
from swinsmt_jax.data import pipeline
from swinsmt_jax.data.layouts import totalsegmentator
from swinsmt_jax.phantoms import dataset as phantom
from swinsmt_jax.runtime import startup
from swinsmt_jax.training import loop
from swinsmt_jax.training.checkpoint import load_model
from swinsmt_jax.training.logs import FILE, read_rows

KILLS = 2
QUICK_STEPS = 12
QUICK = (
    f"--config.training.num_steps={QUICK_STEPS}",
    "--config.training.checkpoint_every=3",
    "--config.training.log_every=1",
    "--config.optimizer.warmup_steps=2",
    "--config.data.patch_shape=(32, 32, 32)",
    "--config.inference.overlap=0.0",
)


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
    step, _, initialize = programs.training_step(config, mesh)
    state = initialize()
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


def overhead(root, *, quick, rounds):
    """Return the headline, and the seconds of the steps of each kind of run."""
    steps, every, writing = (16, 6, 2) if quick else (130, 50, 12)
    rhythm = {"every": every, "writing": writing}
    runs, times = {"bare": run_bare, "full": run_full}, {"bare": [], "full": []}
    for train in runs.values():  # compiles
        train(experiment(root, steps=2, checkpoint_every=2), [])
    for _ in range(rounds):
        for name, train in runs.items():
            found = seconds_of_steps(train, root, steps=steps, every=every)
            times[name].append(found)
            print(f"{name}: median {statistics.median(found):.4f} s/step", flush=True)
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
    return headline, times


def training(root, workdir, changes):
    """Return the command of a run."""
    flags = (f"--workdir={workdir}", f"--config.data.root={root}", *changes)
    return [sys.executable, "train.py", "--config=configs/demo.py", *flags]


def to_the_end(command):
    """Run to the end."""
    subprocess.run(command, cwd=ROOT, check=True)


def train_killed(command, workdir, *, steps, moment):
    """Run to the end through `KILLS` kills; return the steps that were logged then."""
    killed = []
    for bound in sorted(moment.sample(range(1, steps - 2), KILLS)):
        process = subprocess.Popen(command, cwd=ROOT)
        while process.poll() is None and _last(workdir) < bound:
            time.sleep(0.05)
        time.sleep(moment.random() / 2)  # in a step, between steps, or in a save
        if process.poll() is not None:
            raise RuntimeError(f"the run ended before its kill, {process.returncode}")
        process.kill()
        process.wait()
        killed.append(_last(workdir))
    to_the_end(command)
    return killed


def _last(workdir):
    rows = read_rows(workdir / FILE)
    return rows[-1]["step"] if rows else 0


def evaluate(workdir):
    """Return the printed table and the Dice of the test split."""
    command = [sys.executable, "evaluate.py", f"--workdir={workdir}", "--split=test"]
    done = subprocess.run(
        command, cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True
    )
    results = json.loads((workdir / "eval_test" / "results.json").read_text())
    return done.stdout, results["dice"]


def same_parameters(one, other):
    """Whether the last parameters of two runs are equal bit by bit."""
    models = (load_model(workdir, step="latest")[1] for workdir in (one, other))
    leaves = (jax.tree.leaves(nnx.state(model)) for model in models)
    return all(np.array_equal(a, b) for a, b in zip(*leaves, strict=True))


def killed_and_whole(folder, *, quick, seed):
    """Make the phantoms, train twice, evaluate both and compare."""
    cases = {"train": 3, "val": 1, "test": 2} if quick else None
    cases = cases or {"train": 32, "val": 3, "test": 5}
    root = folder / "phantoms"
    if not root.exists():
        more = {} if quick else {"variation": 0.5}
        phantom.write_dataset(root, **cases, spacing=12.0, seed=0, **more)
    steps = QUICK_STEPS if quick else demo.get_config().training.num_steps
    changes = QUICK if quick else ("--config.training.log_every=1",)
    whole, cut = folder / "undisturbed", folder / "killed"
    to_the_end(training(root, whole, changes))
    killed = train_killed(
        training(root, cut, changes), cut, steps=steps, moment=random.Random(seed)
    )
    tables, dice = zip(*map(evaluate, (whole, cut)), strict=True)
    for name, table in zip(("undisturbed", "killed and resumed"), tables, strict=True):
        print(f"{name}:\n{table}", flush=True)
    headline = {
        "dice": dice[0]["overall"],
        "dice_killed": dice[1]["overall"],
        "same_dice": dice[0] == dice[1],
        "same_parameters": same_parameters(whole, cut),
    }
    rows = [{"run": "undisturbed", "dice": dice[0]}]
    rows.append({"run": "killed", "dice": dice[1], "killed_at_steps": killed})
    return headline, rows


def main(options):
    startup.start()
    with tempfile.TemporaryDirectory() as temporary:
        if options.killed:
            folder = Path(options.folder or temporary).absolute()
            headline, rows = killed_and_whole(
                folder, quick=options.quick, seed=options.seed
            )
            print(rows[1]["killed_at_steps"], headline)
            return save(headline, rows=rows)
        logging.disable(logging.INFO)
        root = options.root or Path(temporary) / "phantoms"
        if not options.root:
            phantom.write_dataset(root, train=4, val=1, test=1, spacing=12.0, seed=0)
        rounds = 1 if options.quick else options.rounds
        headline, times = overhead(root, quick=options.quick, rounds=rounds)
        show(headline)
        model = experiment(root, steps=2, checkpoint_every=2).model
        save(headline, seconds_of_steps=times, model=dataclasses.asdict(model))


if __name__ == "__main__":
    flags.DEFINE_string("root", None, "dataset; by default six phantoms are made")
    flags.DEFINE_integer("rounds", 3, "turns of each")
    flags.DEFINE_bool("killed", False, "kill and resume the demo")
    flags.DEFINE_string("folder", None, "keeps data and runs of --killed")
    flags.DEFINE_integer("seed", 0, "of the moments of the kills")
    run(main, quick="few steps, to see that it works")
