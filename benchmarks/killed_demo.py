"""Does a run that was killed end as the one that was not?

    python -m benchmarks.killed_demo [--quick] [--json=FILE] [--folder=F] [--seed=0]

trains configs/demo.py by train.py undisturbed, and again killed twice with SIGKILL at
random moments and resumed by the same command; then evaluates both on the test split.
Printed are both Dice tables, and whether they and the final parameters are identical.
`--quick` takes few steps of small patches.
"""

import json
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import jax
import numpy as np
from absl import app, flags
from flax import nnx

from benchmarks import define_file, report, write
from configs import demo
from swinsmt_jax.phantoms import dataset as phantom
from swinsmt_jax.runtime import startup
from swinsmt_jax.training.checkpoint import load_model
from swinsmt_jax.training.logs import FILE, read_rows

ROOT = Path(demo.__file__).resolve().parents[1]
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


def training(root, workdir, changes):
    """Return the command of a run."""
    flags = (f"--workdir={workdir}", f"--config.data.root={root}", *changes)
    return [sys.executable, "train.py", "--config=configs/demo.py", *flags]


def train(command):
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
    train(command)
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


def measure(folder, *, quick, seed):
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
    train(training(root, whole, changes))
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
    return report(headline, rows=rows)


@startup.exit_on_user_error("killed_demo")
def main(_):
    options = flags.FLAGS
    startup.start()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(options.folder or temporary).absolute()
        found = measure(folder, quick=options.quick, seed=options.seed)
    print(json.dumps(found["rows"][1]["killed_at_steps"]), found["headline"])
    write(options.json, found)


if __name__ == "__main__":
    flags.DEFINE_bool("quick", False, "few steps, to see that it works")
    define_file("json", "also write the figures to this file")
    flags.DEFINE_string("folder", None, "keeps data and runs; by default they are not")
    flags.DEFINE_integer("seed", 0, "of the moments of the kills")
    app.run(main)
