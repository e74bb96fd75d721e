"""Train several networks on the same phantoms with the same budget; compare Dice.

    python -m benchmarks.compare --models=swin_unetr,swin_smt --budget=200 \
        [--budget_in=steps] [--size=small] [--seeds=0,1] [--json=FILE]
    python -m benchmarks.compare --quick

The networks are the small forms of `benchmarks.small_networks`; phantoms are made in
--root if they are missing. All networks see the same crops in the same order. The
budget is of optimiser steps, or, with --budget_in=tflop, of forward operations (see
`training.operations`), so that a cheaper network takes more steps. Printed are Dice
by group on the test phantoms, in per cent, with 95 % bootstrap intervals over cases
(and seeds, where there are several), and the difference of each network to the first,
resampled in pairs.

A name may end with how attention rounds: swin_smt+bfloat16 computes in bfloat16 with
float32 logits in its routing, swin_smt+fused as cuDNN's fused attention does, by its
plain form.

--quick trains two tiny networks for two steps, to see that it works; flags that are
given beside it hold.

A study of small networks, short runs and one learning rate on synthetic bodies shows a
tendency, not a published result.
"""

import contextlib
import dataclasses
import functools
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from absl import flags

from benchmarks import markdown_table, run, save, small_networks
from swinsmt_jax import checks, labels, models
from swinsmt_jax.config import ExperimentConfig, from_config_dict
from swinsmt_jax.data.layouts.totalsegmentator import find_cases
from swinsmt_jax.evaluation import validation
from swinsmt_jax.evaluation.averages import group_averages, known_groups
from swinsmt_jax.evaluation.metrics import DICE
from swinsmt_jax.inference.segmenter import predict_fn
from swinsmt_jax.ops import by_platform
from swinsmt_jax.phantoms.dataset import write_dataset
from swinsmt_jax.runtime import operations, startup
from swinsmt_jax.training import loop
from swinsmt_jax.training.checkpoint import load_model

REPLICATES = 2000
INTERVAL = (2.5, 97.5)  # percentiles
ROUTING = {"bfloat16": "streaming", "fused": "cudnn"}
QUICK = {
    "models": ["nnunet_plain", "unetr"],
    "budget": 2.0,
    "size": "tiny",
    "patch": ["32", "32", "32"],
    "root": "data/compare_phantoms_quick",
    "train": 2,
    "test": 2,
}


def step_gflop(config: ExperimentConfig) -> float:
    """GFLOP of the forward pass of one training step, routing in the dense form."""
    model = config.model
    if model.num_experts:
        model = dataclasses.replace(model, routing="dense")
    one = operations.forward_operations(model, config.data.patch_shape)
    return config.data.batch_size * one / 1e9


def attention_of(name: str) -> contextlib.AbstractContextManager:
    """Return how a network's attention is computed, by the end of its name."""
    fused = name.endswith("+fused")
    return by_platform.fused_attention("xla") if fused else contextlib.nullcontext()


def steps_of(budget: float, unit: str, config: ExperimentConfig) -> int:
    """Return the optimiser steps that the budget allows."""
    checks.require(budget > 0, f"--budget is {budget:g}, but must be positive.")
    cost = 1.0 if unit == "steps" else step_gflop(config) / 1e3
    checks.require(
        budget >= cost,
        f"--budget is {budget:g} {unit}, but one step takes {cost:.3g}; give more.",
    )
    return int(budget / cost)


def train_and_score(config: ExperimentConfig) -> dict:
    """Train, and return Dice `[cases, K]` on the test split and seconds."""
    cases = find_cases(config.data.root, split="test")
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        loop.train(config, workdir=folder)
        seconds = time.perf_counter() - start
        _, model, _ = load_model(Path(folder))
        segment = functools.partial(
            validation.segment_case,
            predict_fn(model),
            data=config.data,
            inference=config.inference,
            num_classes=config.model.out_channels,
        )
        results = [segment(case).result for case in cases]
    later = [result.seconds for result in results[1:] or results]  # after compilation
    return {
        "scores": np.stack([result.of(DICE) for result in results]),
        "train_s": seconds,
        "scan_s": float(np.median(later)),
    }


def mean_dice(scores: np.ndarray) -> dict[str, float]:
    """Dice by group and overall, in per cent, of `[seeds, cases, K]`."""
    groups = known_groups(labels.GROUPS, scores.shape[-1])
    found = group_averages(scores.mean(axis=0), groups=groups)
    return {name: 100 * mean["over_classes"] for name, mean in found.items()}


def intervals(statistic, *scores: np.ndarray, seed: int = 0) -> dict:
    """Return the bootstrap interval of a statistic of scores `[seeds, cases, K]`.

    Cases and seeds are drawn with replacement, the same ones of all scores: a
    difference is resampled in pairs.
    """
    rng = np.random.default_rng(seed)
    seeds, cases = scores[0].shape[:2]
    values: dict[str, list[float]] = {}
    for _ in range(REPLICATES):
        pick = np.ix_(rng.integers(seeds, size=seeds), rng.integers(cases, size=cases))
        for name, value in statistic(*(s[pick] for s in scores)).items():
            values.setdefault(name, []).append(value)
    return {n: tuple(np.nanpercentile(v, INTERVAL)) for n, v in values.items()}


def difference(scores: np.ndarray, first: np.ndarray) -> dict[str, float]:
    """Dice of the scores less that of the first network."""
    ours, theirs = mean_dice(scores), mean_dice(first)
    return {name: ours[name] - theirs[name] for name in ours}


def experiment_of(name: str, options) -> ExperimentConfig:
    """Return a network's experiment, as long as the budget allows."""
    network, _, rounding = name.partition("+")
    values = small_networks.experiment(
        network, size=options.size, patch_shape=tuple(map(int, options.patch))
    )
    if rounding:
        checks.one_of("what follows + in --models", rounding, ROUTING)
        values.model.update({"dtype": "bfloat16", "routing": ROUTING[rounding]})
    values.data.root = options.root
    values.optimizer.learning_rate = options.learning_rate
    config = from_config_dict(values)
    steps = steps_of(options.budget, options.budget_in, config)
    training = dataclasses.replace(
        config.training, num_steps=steps, checkpoint_every=steps, log_every=steps
    )
    optimizer = dataclasses.replace(
        config.optimizer, warmup_steps=min(config.optimizer.warmup_steps, steps // 10)
    )
    return dataclasses.replace(config, optimizer=optimizer, training=training)


def study(name: str, config: ExperimentConfig, *, seeds: Sequence[int]) -> dict:
    """Train one network once for each seed; return its row."""
    runs = []
    for seed in seeds:
        training = dataclasses.replace(config.training, seed=seed)
        runs.append(train_and_score(dataclasses.replace(config, training=training)))
    scores = np.stack([found["scores"] for found in runs])
    return {
        "name": name,
        "parameters": models.count_parameters(config.model),
        "steps": config.training.num_steps,
        "step_gflop": step_gflop(config),
        "train_s": float(np.mean([found["train_s"] for found in runs])),
        "scan_s": float(np.mean([found["scan_s"] for found in runs])),
        "dice": mean_dice(scores),
        "interval": intervals(mean_dice, scores),
        "overall_by_seed": [mean_dice(s[None])["overall"] for s in scores],
        "scores": scores,
    }


def compare(options) -> list[dict]:
    """Train all networks; each row but the first has its difference to the first."""
    seeds = [int(seed) for seed in options.seeds]
    experiments = {name: experiment_of(name, options) for name in options.models}
    write_dataset(
        options.root,
        train=options.train,
        val=0,
        test=options.test,
        spacing=options.spacing,
        variation=options.variation,
        seed=0,
        workers=2,
    )
    rows = []
    for name, config in experiments.items():
        with attention_of(name):
            row = study(name, config, seeds=seeds)
        if rows:
            pair = row["scores"], rows[0]["scores"]
            row["difference"] = difference(*pair)
            row["difference_interval"] = intervals(difference, *pair)
        rows.append(row)
        print(f"{name}: overall Dice {row['dice']['overall']:.2f} %", flush=True)
    return rows


def markdown(rows: list[dict]) -> str:
    """Return the tables of Dice and of the differences."""

    def cells(row, what, where, sign=""):
        return [
            f"{row[what][g]:{sign}.1f} [{low:{sign}.1f}, {high:{sign}.1f}]"
            for g, (low, high) in row[where].items()
        ]

    groups = list(rows[0]["dice"])
    header = ("parameters", "steps", "GFLOP a step", "training, s", "scan, s")
    table = [
        [
            row["name"],
            f"{row['parameters']:,}",
            str(row["steps"]),
            f"{row['step_gflop']:.1f}",
            f"{row['train_s']:.0f}",
            f"{row['scan_s']:.2f}",
            *cells(row, "dice", "interval"),
        ]
        for row in rows
    ]
    text = markdown_table(["network", *header, *groups], table)
    table = [
        [
            f"{row['name']} – {rows[0]['name']}",
            *cells(row, "difference", "difference_interval", "+"),
        ]
        for row in rows[1:]
    ]
    return text + "\n" + markdown_table(["difference", *groups], table) * bool(table)


def set_quick(options: flags.FlagValues) -> None:
    """Set the flags of a quick run, where the command line does not."""
    for name, value in QUICK.items():
        if not options[name].present:
            options[name].value = value


def main(options):
    startup.start()
    if options.quick:
        set_quick(options)
    rows = compare(options)
    print(markdown(rows))
    headline = {f"dice_{row['name']}": row["dice"]["overall"] for row in rows}
    rows = [{k: v for k, v in row.items() if k != "scores"} for row in rows]
    save(headline, rows=rows)


if __name__ == "__main__":
    names = ", ".join(small_networks.MODELS)
    flags.DEFINE_list("models", ["swin_unetr", "swin_smt"], f"of {names}")
    flags.DEFINE_float("budget", 200, "of the training of each network")
    flags.DEFINE_enum("budget_in", "steps", ("steps", "tflop"), "its unit")
    flags.DEFINE_enum("size", "small", small_networks.SIZES, "of the networks")
    flags.DEFINE_list("seeds", ["0"], "of initialisation and data order")
    flags.DEFINE_list("patch", ["32", "32", "64"], "of training crop and window")
    flags.DEFINE_float("learning_rate", 8e-3, "of all networks")
    flags.DEFINE_string("root", "data/compare_phantoms", "folder of the phantoms")
    flags.DEFINE_integer("train", 32, "training phantoms")
    flags.DEFINE_integer("test", 12, "test phantoms")
    flags.DEFINE_float("spacing", 12.0, "side of the phantoms' voxels in mm")
    flags.DEFINE_float("variation", 0.5, "scale of the differences between bodies")
    run(main, quick="two tiny networks, two steps")
