"""Runs of a study: small networks trained on phantoms, each kept in its own folder.

A network's name may be followed by changes: swin_smt+num_experts=8+num_moe_stages=2
sets keys of its config. swin_smt+bfloat16 computes in bfloat16 with float32 logits in
its routing, swin_smt+fused as cuDNN's fused attention does, by its plain form.
"""

import contextlib
import dataclasses
import functools
import json
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
from absl import flags

from benchmarks import expert_use, save, small_networks
from swinsmt_jax import checks, labels, models
from swinsmt_jax.class_map import ClassMap
from swinsmt_jax.config import ExperimentConfig, from_config_dict, to_dict
from swinsmt_jax.data import pipeline
from swinsmt_jax.evaluation import compare as evaluation
from swinsmt_jax.evaluation import validation
from swinsmt_jax.evaluation.averages import group_averages
from swinsmt_jax.evaluation.metrics import DICE
from swinsmt_jax.inference.segmenter import predict_fn
from swinsmt_jax.ops import by_platform
from swinsmt_jax.phantoms.dataset import write_dataset
from swinsmt_jax.runtime import files, operations
from swinsmt_jax.training import loop
from swinsmt_jax.training.checkpoint import load_model
from swinsmt_jax.training.workdir import CHECKPOINTS

flags.disclaim_key_flags()  # they are the benchmark's
REPLICATES = 2000
INTERVAL = (2.5, 97.5)  # percentiles
ROUTING = {"bfloat16": "streaming", "fused": "cudnn"}
SCORES = "scores.json"


QUICK = {
    "budget": 2.0,
    "size": "tiny",
    "root": "data/compare_phantoms_quick",
    "train": 2,
    "val": 1,
    "test": 2,
}


def step_gflop(config: ExperimentConfig) -> float:
    """GFLOP of the forward pass of one training step, routing in the dense form."""
    model = config.model
    if model.num_experts:
        model = dataclasses.replace(model, routing="dense")
    one = operations.forward_operations(model, config.data.patch_shape)
    return config.data.batch_size * one / 1e9


def steps_of(budget: float, unit: str, config: ExperimentConfig) -> int:
    """Return the optimiser steps that the budget allows."""
    checks.require(budget > 0, f"--budget is {budget:g}, but must be positive.")
    cost = 1.0 if unit == "steps" else step_gflop(config) / 1e3
    checks.require(
        budget >= cost,
        f"--budget is {budget:g} {unit}, but one step takes {cost:.3g}; give more.",
    )
    return int(budget / cost)


def define_flags(*, workdir: str) -> None:
    """Define the flags of a study, whose runs are in `workdir` by default."""
    flags.DEFINE_float("budget", 200, "of the training of each network")
    flags.DEFINE_enum("budget_in", "steps", ("steps", "tflop"), "its unit")
    flags.DEFINE_enum("size", "small", small_networks.SIZES, "of the networks")
    flags.DEFINE_list("seeds", ["0"], "of initialisation and data order")
    flags.DEFINE_list("patch", ["32", "32", "64"], "voxels of training crop and window")
    flags.DEFINE_integer(
        "batch", 1, "crops of a step, a multiple of the mesh's devices"
    )
    flags.DEFINE_list("mesh", ["1", "1"], "devices along its axes, data and expert")
    flags.DEFINE_list("learning_rates", ["8e-3"], "of which each network has the best")
    flags.DEFINE_string("root", "data/compare_phantoms", "dataset; if new, phantoms")
    flags.DEFINE_string("description", "", "of that dataset, as data.description")
    flags.DEFINE_string("workdir", workdir, "folder of the runs")
    flags.DEFINE_integer("train", 32, "training phantoms")
    flags.DEFINE_integer("val", 4, "validation phantoms")
    flags.DEFINE_integer("test", 12, "test phantoms")
    flags.DEFINE_float("spacing", 12.0, "side of the phantoms' voxels in mm")
    flags.DEFINE_float("variation", 0.5, "scale of the differences between bodies")


def set_quick(options: flags.FlagValues, **values) -> None:
    """Set the flags of a quick run, where the command line does not."""
    for name, value in (QUICK | values).items():
        if not options[name].present:
            options[name].value = value


def _classes_of(options):
    """Return the classes of the data, which are made if there are none."""
    if not files.absolute(options.root).exists():
        write_dataset(
            options.root,
            **{split: getattr(options, split) for split in ("train", "val", "test")},
            spacing=options.spacing,
            variation=options.variation,
            seed=0,
            workers=2,
        )
    data = {"root": options.root, "description": options.description}
    for split in ("train", "val", "test"):  # none is found missing after hours
        _, classes = pipeline.open_data(**data, split=split)
    return classes


def experiment_of(
    name: str, options: flags.FlagValues, classes: ClassMap
) -> ExperimentConfig:
    """Return the experiment of a name with its changes, as long as the budget allows.

    Raises:
        UserError: for an unknown network, key or value, and a budget below one step.
    """
    network, *changes = name.split("+")
    values = small_networks.experiment(
        network,
        size=options.size,
        patch_shape=tuple(map(int, options.patch)),
        classes=classes.num_classes,
    )
    for change in changes:
        key, given, value = change.partition("=")
        if given:
            values.model[key] = int(value) if value.isdigit() else value
        else:
            checks.one_of("what follows + in --models", key, ROUTING)
            values.model.update({"dtype": "bfloat16", "routing": ROUTING[key]})
    data = {name: getattr(options, name) for name in ("root", "description")}
    values.data.update({**data, "batch_size": options.batch})
    values.mesh.data, values.mesh.expert = map(int, options.mesh)
    config = from_config_dict(values)
    steps = steps_of(options.budget, options.budget_in, config)
    training = dataclasses.replace(
        config.training,
        num_steps=steps,
        checkpoint_every=-(-steps // 2),
        log_every=max(1, steps // 10),
    )
    optimizer = dataclasses.replace(
        config.optimizer, warmup_steps=min(config.optimizer.warmup_steps, steps // 10)
    )
    return dataclasses.replace(config, optimizer=optimizer, training=training)


def trial(config: ExperimentConfig, *, folder: Path, name: str = "") -> dict:
    """Train in a folder, or go on there; return what is measured, kept as JSON.

    Of a run that has ended, its scores, config and log stay.

    Returns:
        Dice `[cases, K]` of the splits "val" and "test"; seconds of a training made in
        one go and of a scan; "experts", see `expert_use.expert_use`.

    Raises:
        UserError: if the folder has the run of another config.
    """
    file, about = folder / SCORES, json.loads(json.dumps(to_dict(config)))
    if file.exists():
        found = files.read_json(file)
        checks.require(
            found.pop("config") == about,
            f"{file} is of a run with other settings; give another --workdir.",
        )
    else:
        with _attention_of(name):
            found = _measured(config, folder)
        files.write_json(file, found | {"config": about})
        shutil.rmtree(folder / CHECKPOINTS)
    arrays = {split: np.array(found[split], float) for split in ("val", "test")}
    return found | arrays


def _attention_of(name):
    fused = "fused" in name.split("+")
    return by_platform.fused_attention("xla") if fused else contextlib.nullcontext()


def _measured(config, folder):
    fresh, start = not folder.exists(), time.perf_counter()
    loop.train(config, workdir=folder)
    seconds = time.perf_counter() - start
    _, model, _ = load_model(folder, step="latest")
    segment = functools.partial(
        validation.segment_case,
        predict_fn(model),
        data=config.data,
        inference=config.inference,
        num_classes=config.model.out_channels,
    )
    found = {"train_s": seconds if fresh else None}
    for split in ("val", "test"):
        cases = pipeline.find_cases(config.data, split=split)
        results = [segment(case).result for case in cases]
        dice = [result.of(DICE) for result in results]
        found[split] = [
            [None if np.isnan(d) else float(d) for d in own] for own in dice
        ]
    later = [result.seconds for result in results[1:] or results]  # after compilation
    found["scan_s"] = float(np.median(later))
    if config.model.num_experts:
        found["experts"] = expert_use.expert_use(folder, split="test")
    return found


def mean_dice(
    scores: np.ndarray, groups: Mapping[str, Sequence[int]] = labels.GROUPS
) -> dict[str, float]:
    """Dice by group and overall, in per cent, of `[seeds, cases, K]`."""
    found = group_averages(scores.mean(axis=0), groups=groups)
    return {name: 100 * mean["over_classes"] for name, mean in found.items()}


def intervals(statistic: Callable, *scores: np.ndarray, seed: int = 0) -> dict:
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


def difference(
    scores: np.ndarray,
    first: np.ndarray,
    groups: Mapping[str, Sequence[int]] = labels.GROUPS,
) -> dict[str, float]:
    """Dice of the scores less that of the first network."""
    ours, theirs = mean_dice(scores, groups), mean_dice(first, groups)
    return {name: ours[name] - theirs[name] for name in ours}


def study(
    names: Sequence[str], options: flags.FlagValues, *, once: Sequence[str] = ()
) -> Iterator[dict]:
    """Yield a row for each name; all but the first have their difference to it.

    Args:
        names: of networks, with their changes.
        options: values of `define_flags`.
        once: those of the names that are trained with the first seed alone.

    Raises:
        UserError: before anything is trained, for a name or flag that cannot be.
    """
    classes = _classes_of(options)
    experiments = {name: experiment_of(name, options, classes) for name in names}
    rates = [float(rate) for rate in options.learning_rates]
    groups = classes.groups or {"structures": range(1, classes.num_classes)}
    by_group = functools.partial(mean_dice, groups=groups)
    change = functools.partial(difference, groups=groups)
    first = None
    for name, config in experiments.items():
        seeds = [int(seed) for seed in options.seeds][: 1 if name in once else None]
        workdir = files.absolute(options.workdir)
        about = {"seeds": seeds, "rates": rates, "workdir": workdir}
        row = _row(name, config, by_group, **about)
        if first is None:
            first = row["scores"]
        else:
            pair = row["scores"], first[: len(seeds)]
            row["difference"] = change(*pair)
            row["difference_interval"] = intervals(change, *pair)
            row["p"] = evaluation.wilcoxon(_overall(pair[0]) - _overall(pair[1]))
        print(f"{name}: overall Dice {row['dice']['overall']:.2f} %", flush=True)
        yield row


def save_rows(rows: Sequence[dict]) -> None:
    """Save the rows, without the scores of each case, as the flag --json says."""
    headline = {f"dice_{row['name']}": row["dice"]["overall"] for row in rows}
    rows = [{k: v for k, v in row.items() if k != "scores"} for row in rows]
    save(headline, rows=rows)


def _overall(scores):
    """Return the mean Dice of each case over its classes and the seeds."""
    return np.nanmean(scores[..., 1:].mean(axis=0), axis=-1)


def _row(
    name: str,
    config: ExperimentConfig,
    by_group: Callable[[np.ndarray], dict],
    *,
    seeds: Sequence[int],
    rates: Sequence[float],
    workdir: Path,
) -> dict:
    """Return a network's row: trained with each seed, at the best learning rate.

    Of several rates, the first seed's run with the best Dice on the validation split
    decides.
    """

    def run(rate, seed):
        training = dataclasses.replace(config.training, seed=seed)
        optimizer = dataclasses.replace(config.optimizer, learning_rate=rate)
        one = dataclasses.replace(config, training=training, optimizer=optimizer)
        return trial(one, folder=workdir / name / f"{rate:g}_{seed}", name=name)

    by_rate = {}
    if len(rates) > 1:
        found = [run(rate, seeds[0])["val"][None] for rate in rates]
        by_rate = {
            f"{r:g}": by_group(s)["overall"] for r, s in zip(rates, found, strict=True)
        }
    rate = max(rates, key=lambda rate: by_rate.get(f"{rate:g}", 0))
    runs = [run(rate, seed) for seed in seeds]
    scores = np.stack([found["test"] for found in runs])
    seconds = [found["train_s"] for found in runs if found["train_s"]]
    return {
        "name": name,
        "parameters": models.count_parameters(config.model),
        "steps": config.training.num_steps,
        "step_gflop": step_gflop(config),
        "learning_rate": rate,
        "validation_by_rate": by_rate,
        "train_s": float(np.mean(seconds)) if seconds else None,
        "scan_s": float(np.mean([found["scan_s"] for found in runs])),
        "dice": by_group(scores),
        "interval": intervals(by_group, scores),
        "overall_by_seed": [by_group(s[None])["overall"] for s in scores],
        "experts": [found["experts"] for found in runs if "experts" in found],
        "scores": scores,
    }
