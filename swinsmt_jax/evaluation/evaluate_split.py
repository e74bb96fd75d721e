"""Evaluate a split from end to end: predictions, table, files and picture."""

import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import jax
from tqdm import tqdm

from swinsmt_jax import checks
from swinsmt_jax.config import ExperimentConfig
from swinsmt_jax.data import pipeline
from swinsmt_jax.evaluation import html_report, pictures, run, tables
from swinsmt_jax.inference.segment import batch_sharding, left_right_swap, predict_fn
from swinsmt_jax.models import abstract_model
from swinsmt_jax.runtime import processes
from swinsmt_jax.runtime.operations import forward_operations


def evaluate_split(
    model: Callable,
    config: ExperimentConfig,
    *,
    split: str,
    groups: Mapping[str, Sequence[int]],
    rule: str,
    output: Path,
    limit: int = 0,
    step: int | None = None,
    surface_rule: run.SurfaceRule | None = None,
    mirror: bool = False,
) -> str:
    """Segment the cases of a split, write all results, and return the Dice table.

    Written to `output`: per_class.csv, per_case.csv, results.json, overview.png and
    report.html.
    Several processes divide the cases between them, and the first one writes.

    Args:
        model: the trained network.
        config: of its experiment; `data.root` holds the cases.
        split: "train", "val" or "test".
        groups: class ids by group, the columns of the table.
        rule: the average that counts as the result, one of `metrics.AVERAGES`.
        output: folder, made if missing.
        limit: evaluate only so many cases, the first ones; 0 takes all.
        step: of the checkpoint, for the record.
        surface_rule: how surfaces are compared; None leaves that out.
        mirror: average over windows and their mirror images.

    Raises:
        UserError: for an empty split, bad files, labels unknown to the network, or an
            output path that is no folder.
    """
    checks.in_range("limit", limit, 0, 10**9)
    groups = run.known_groups(groups, config.model.out_channels)
    names, num_classes = pipeline.class_names(config.data), config.model.out_channels
    exchanged = left_right_swap(names, num_classes=num_classes) if mirror else None
    predict = predict_fn(model, exchanged=exchanged)
    cases = processes.together(lambda: _cases(config, split, limit, output))
    processes.require_same({"cases": [case.name for case in cases]})
    found = processes.together(
        lambda: _segment(predict, config, cases, split, surface_rule)
    )
    results, views = zip(*processes.unshare(found), strict=True)
    about = {
        "split": split,
        "step": step,
        "data_root": str(config.data.root),
        "window": list(config.data.patch_shape),
        "overlap": config.inference.overlap,
        "blend": config.inference.blend,
        "mirror": mirror,
        "spacing": config.data.spacing,
        "dtype": config.model.dtype,
        "device": jax.devices()[0].device_kind,
        **cost(config, results),
        **about_surfaces(surface_rule),
    }
    title = f"{len(results)} cases of the split {split!r}, checkpoint of step {step}"
    note = (
        f"{about['parameters'] / 1e6:,.1f} M parameters, "
        f"{about['gflop_per_window']:,.0f} GFLOP a window, "
        f"{about['seconds_per_scan']:.1f} s a scan (median, reading not counted)"
    )
    return write_results(
        output,
        results,
        views,
        groups=groups,
        rule=rule,
        about=about,
        title=title,
        note=note,
        names=names,
        num_classes=num_classes,
        hu_range=config.data.hu_range,
    )


def write_results(
    output: Path,
    results: Sequence[run.CaseResult],
    views: Sequence[pictures.CaseViews],
    *,
    groups: Mapping[str, Sequence[int]],
    rule: str,
    about: dict,
    title: str,
    names: Sequence[str],
    num_classes: int,
    hu_range: Sequence[float],
    note: str = "",
) -> str:
    """Write the files of an evaluation and return the Dice table, `note` at its end.

    Other arguments as in `tables` and `pictures`. The first of the processes writes.
    """

    def write():
        tables.write_per_class(
            output / "per_class.csv", results, groups=groups, names=names
        )
        tables.write_per_case(output / "per_case.csv", results, groups=groups)
        tables.write_json(
            output / "results.json",
            results,
            groups=groups,
            rule=rule,
            about=about,
            names=names,
        )
        pictures.write_overview(
            output / "overview.png", views, num_classes=num_classes, hu_range=hu_range
        )

        html_report.write(
            output / "report.html",
            results,
            views,
            table=table,
            groups=groups,
            names=names,
            about=about,
            num_classes=num_classes,
            hu_range=hu_range,
        )

    table = tables.dice_table(results, groups=groups, rule=rule, title=title)
    if "surface_tolerance_mm" in about:
        table += f"\nSurface Dice: within {about['surface_tolerance_mm']:g} mm."
    table = f"{table}\n{note}".rstrip()
    first = processes.is_first()
    processes.together(lambda: write() if first else None)
    return table


def cost(config: ExperimentConfig, results) -> dict[str, float]:
    """Return parameters, GFLOP of a window (Soft MoE dense), and seconds a scan."""
    window, (_, params) = config.data.patch_shape, abstract_model(config.model)
    return {
        "parameters": sum(x.size for x in jax.tree.leaves(params)),
        "gflop_per_window": forward_operations(config.model, window) / 1e9,
        "seconds_per_scan": statistics.median(r.seconds for r in results),
    }


def about_surfaces(rule: run.SurfaceRule | None) -> dict:
    """Say in a report how surfaces were compared."""
    if rule is None:
        return {}
    return {"surface_tolerance_mm": rule.tolerance, "surface_spacing": rule.spacing}


def _cases(config, split, limit, output):
    """Find the cases, and make the folder of the results once they are found."""
    cases = pipeline.find_cases(config.data, split=split)
    if processes.is_first():
        make_folder(output)
    return cases[: limit or None]


def _segment(predict, config, cases, split, surface_rule):
    """Return result and views of each case that this process has to do."""
    bar = tqdm(
        processes.share(cases),
        desc=f"evaluating {split}",
        unit="case",
        disable=not processes.is_first(),
    )
    segmented = run.segment_cases(
        predict,
        bar,
        data=config.data,
        inference=config.inference,
        num_classes=config.model.out_channels,
        sharding=batch_sharding(),
        surface_rule=surface_rule,
    )
    return [(case.result, pictures.views_of(case)) for case in segmented]


def make_folder(path: Path) -> None:
    """Make a folder and those above it; a `UserError` if something is in the way."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise checks.UserError(
            f"the output folder {path} cannot be made: {error.strerror}; "
            "choose another."
        ) from error
