"""The demo with several seeds: what its Dice owes to chance.

    python -m benchmarks.demo --root=data/phantoms [--seeds=0,1,2,3,4] [--others=FOLDER]
        [--workdir=runs/demo_seeds] [--quick] [--json=FILE]

For each seed, train.py with configs/demo.py on the phantoms in --root, which `make
demo` makes, and evaluate.py on its test bodies; with --others, also on the test bodies
of another folder of phantoms. Printed are Dice by group and overall, in per cent, and
the seconds of training where a run was made in one go. The runs are kept in --workdir,
and the same command continues them. --quick takes two steps of one small network.
"""

import json
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
from absl import flags

from benchmarks import ROOT, markdown_table, run, save, show
from swinsmt_jax.runtime.files import absolute

SMALL = (
    "--config.model.feature_size=12",
    "--config.optimizer.warmup_steps=1",
    "--config.training.num_steps=2",
)


def train(seed: int, *, root: Path, workdir: Path, small: bool) -> float | None:
    """Train or continue the run of a seed; return the seconds of one made in one go."""
    fresh, start = not workdir.exists(), time.perf_counter()
    command = [
        *(sys.executable, "train.py", "--config=configs/demo.py"),
        *(f"--workdir={workdir}", f"--config.data.root={root}"),
        *(f"--config.training.seed={seed}", *(SMALL if small else ())),
    ]
    subprocess.run(command, cwd=ROOT, check=True)
    return time.perf_counter() - start if fresh else None


def evaluate(workdir: Path, *, root: Path, output: Path) -> dict[str, float]:
    """Return the Dice of a run by group on the test bodies of a folder, in per cent."""
    command = [
        *(sys.executable, "evaluate.py", f"--workdir={workdir}", "--split=test"),
        *(f"--data_root={root}", f"--output={output}"),
    ]
    subprocess.run(command, cwd=ROOT, check=True)
    dice = json.loads((output / "results.json").read_text())["dice"]
    return {name: 100 * value for name, value in dice.items()}


def headline(rows: list[dict]) -> dict[str, float]:
    """Return mean and worst overall Dice over the seeds, by flat names."""
    found = {}
    for name in ("dice", "dice_others"):
        overall = [row[name]["overall"] for row in rows if name in row]
        if overall:
            found |= {f"{name}_mean": float(np.mean(overall))}
            found |= {f"{name}_worst": min(overall)}
    return found


def main(options: flags.FlagValues) -> None:
    """Train and evaluate every seed, and print the table."""
    folder, rows = absolute(options.workdir), []
    for seed in [0] if options.quick else map(int, options.seeds):
        workdir, root = folder / f"seed{seed}", absolute(options.root)
        seconds = train(seed, root=root, workdir=workdir, small=options.quick)
        row = {"seed": seed, "seconds": seconds}
        row["dice"] = evaluate(workdir, root=root, output=workdir / "eval_test")
        if options.others:
            row["dice_others"] = evaluate(
                workdir, root=absolute(options.others), output=workdir / "eval_others"
            )
        rows.append(row)
        save(headline(rows), rows=rows)
    lines = [
        [f"{row['seed']}{where}", *(f"{value:.1f}" for value in row[name].values())]
        for name, where in (("dice", ""), ("dice_others", ", others"))
        for row in rows
        if name in row
    ]
    print(markdown_table(["seed", *rows[0]["dice"]], lines))
    show(headline(rows))


if __name__ == "__main__":
    flags.DEFINE_string("root", "data/phantoms", "folder of the phantoms")
    flags.DEFINE_string("others", None, "folder of other phantoms, to test on too")
    flags.DEFINE_string("workdir", "runs/demo_seeds", "folder of the runs")
    flags.DEFINE_list("seeds", ["0", "1", "2", "3", "4"], "of the trainings")
    run(main, quick="two steps of one small network")
