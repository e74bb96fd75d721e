"""Does a Swin SMT that starts from a dense network's weights learn faster?

    python -m benchmarks.upcycling [--quick] [--json=FILE] [--seeds=0,1,2]

Sparse upcycling (Komatsuzaki et al. 2023, arXiv:2212.05055) of small networks on
phantoms. For each seed a Swin UNETR and a Swin SMT of 4 experts are trained for
--before steps. Then three networks of 8 experts are trained for --steps, on the same
crops in the same order: one from scratch and one from each of the two. The table gives
the loss of the first step, before any update of the new weights, the mean loss of the
last tenth of the steps, and the Dice on phantoms that no network was trained on.

The runs are kept in --workdir, and the same command continues them. Small networks and
short runs on synthetic bodies show a tendency, not the paper's result.
"""

import functools
from pathlib import Path

import numpy as np
from absl import flags

from benchmarks import run, save, small_networks
from swinsmt_jax.config import from_config_dict
from swinsmt_jax.convert import starting_point
from swinsmt_jax.data.layouts.totalsegmentator import find_cases
from swinsmt_jax.evaluation import validation
from swinsmt_jax.inference.segmenter import predict_fn
from swinsmt_jax.phantoms.dataset import write_dataset
from swinsmt_jax.runtime import startup
from swinsmt_jax.training import logs, loop
from swinsmt_jax.training.checkpoint import load_model

WAYS = {  # of the networks with 8 experts: what they start from
    "scratch": None,
    "from the dense network": "dense",
    "from 4 experts": "4 experts",
}


def experiment(experts, *, root, seed, steps):
    """Return the config of a small network; 0 experts are a Swin UNETR."""
    name = "swin_smt" if experts else "swin_unetr"
    values = small_networks.experiment(name, size="tiny", patch_shape=(32, 32, 32))
    values.model.depths = (1, 1, 1, 1)
    if experts:
        values.model.update({"num_experts": experts, "num_moe_stages": 2})
    values.data.root = str(root)
    values.training.update({"num_steps": steps, "seed": seed, "log_every": 1})
    values.training.update({"checkpoint_every": steps, "eval_cases": 0})
    values.optimizer.warmup_steps = min(20, steps - 1)
    return from_config_dict(values)


def trained(config, workdir, *, start=None):
    """Train, or go on; return the loss of every step and the Dice on the test split."""
    change = None
    if start is not None:
        change = functools.partial(starting_point.start_from, start)
    loop.train(config, workdir=workdir, start_from=change)
    rows = logs.read_rows(workdir / "metrics.jsonl")
    config, model, _ = load_model(workdir)
    scores = validation.validate(
        predict_fn(model),
        find_cases(config.data.root, split="test"),
        data=config.data,
        inference=config.inference,
        num_classes=config.model.out_channels,
    )
    return np.array([row["loss"] for row in rows]), scores["dice"]


def row_of(seed, name, losses, dice):
    """Return what is told of one run."""
    tail = max(1, len(losses) // 10)
    return {
        "seed": seed,
        "start": name,
        "steps": len(losses),
        "first_loss": float(losses[0]),
        "last_loss": float(losses[-tail:].mean()),
        "dice": float(dice),
        "losses": " ".join(f"{loss:.3f}" for loss in losses),
    }


def main(options):
    startup.start()  # programs are kept, since many runs have the same
    seeds = [0] if options.quick else list(map(int, options.seeds))
    before, steps = (2, 2) if options.quick else (options.before, options.steps)
    root, workdir = Path(options.root), Path(options.workdir)
    if options.quick:
        workdir = workdir / "quick"
    if not (root / "meta.csv").exists():
        write_dataset(root, train=12, val=0, test=4, spacing=12, seed=0)
    rows = []
    for seed in seeds:
        about = {"root": root, "seed": seed}
        runs = {}
        for name, experts in (("dense", 0), ("4 experts", 4)):
            runs[name] = workdir / f"{name.replace(' ', '_')}_{seed}"
            config = experiment(experts, steps=before, **about)
            rows.append(row_of(seed, name, *trained(config, runs[name])))
        config = experiment(8, steps=steps, **about)
        for number, (name, source) in enumerate(WAYS.items()):
            folder = workdir / f"way{number}_{seed}"
            found = trained(config, folder, start=runs.get(source))
            rows.append(row_of(seed, name, *found))
        for row in rows[-2 - len(WAYS) :]:
            print(
                f"seed {seed}  {row['start']:36} loss {row['first_loss']:.3f} to "
                f"{row['last_loss']:.3f}, Dice {row['dice']:.3f}",
                flush=True,
            )
        save(headline(rows), rows=rows)


def headline(rows):
    """Return the figures of each start, and in how many seeds it was ahead."""
    found = {}
    scratch = {row["seed"]: row for row in rows if row["start"] == "scratch"}
    for name in ("dense", "4 experts", *WAYS):
        own = [row for row in rows if row["start"] == name]
        key = name.replace(",", "").replace(" ", "_")
        for what in ("first_loss", "last_loss", "dice"):
            found[f"{what}_{key}"] = float(np.mean([row[what] for row in own]))
        if name not in WAYS or name == "scratch":
            continue
        ahead = [r["last_loss"] < scratch[r["seed"]]["last_loss"] for r in own]
        better = [r["dice"] > scratch[r["seed"]]["dice"] for r in own]
        found[f"ahead_{key}"] = f"{sum(ahead)} of {len(own)}"
        found[f"dice_ahead_{key}"] = f"{sum(better)} of {len(own)}"
    return found


if __name__ == "__main__":
    flags.DEFINE_list("seeds", ["0", "1", "2"], "seeds of weights and crops")
    flags.DEFINE_integer("before", 100, "steps of the networks that are started from")
    flags.DEFINE_integer("steps", 60, "steps of those with 8 experts")
    flags.DEFINE_string("root", "data/upcycling_phantoms", "made if missing")
    flags.DEFINE_string("workdir", "runs/upcycling", "folder of the runs")
    run(main, quick="one seed and two steps")
