"""The files of an evaluation: results.json, CSV tables, a picture and a report."""

import math
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np

from swinsmt_jax import labels
from swinsmt_jax.evaluation import pictures, tables
from swinsmt_jax.evaluation.averages import (
    AVERAGES,
    bootstrap_intervals,
    group_averages,
)
from swinsmt_jax.evaluation.conventions import convention
from swinsmt_jax.evaluation.metrics import DICE, METRICS, Metric
from swinsmt_jax.evaluation.pictures import CaseViews
from swinsmt_jax.evaluation.scoring import Evaluation
from swinsmt_jax.evaluation.surface import SurfaceRule
from swinsmt_jax.runtime import csv_text, files, html, processes

WORST = 5  # cases drawn in the report


def write_results(
    output: Path,
    evaluation: Evaluation,
    views: Sequence[CaseViews],
    *,
    about: dict,
    title: str,
    note: str = "",
    pages: Mapping[str, str] = MappingProxyType({}),
    reported: bool = False,
) -> str:
    """Write the files of an evaluation and return the Dice table, `note` at its end.

    The first of the processes writes.

    Args:
        output: the folder.
        evaluation: of the cases.
        views: of the same cases, in the same order.
        about: plain values that say what was evaluated; copied into the files.
        title, note: of the table.
        pages: {case: file in the folder} in which one looks at it.
        reported: as in `tables.dice_table`.
    """
    head = "\n".join([title, *_head(about)])
    doubts = [f"To check: {n}" for result in evaluation.results for n in result.notes]
    below = "\n".join([note, *doubts]).strip("\n")
    table = tables.dice_table(evaluation, title=head, reported=reported)
    table = f"{table}\n{below}".rstrip()

    def write():
        write_per_class(output / "per_class.csv", evaluation)
        write_per_case(output / "per_case.csv", evaluation)
        write_json(output / "results.json", evaluation, about=about)
        pictures.write_overview(output / "overview.png", views, evaluation.names)
        page = _page(evaluation, views, table=table, about=about, pages=pages)
        files.write_text(output / "report.html", page)

    first = processes.is_first()
    processes.run_on_all(lambda: write() if first else None)
    return table


def about_metrics(
    metrics: Sequence[Metric],
    *,
    surface_rule: SurfaceRule | None,
    protocol: str | None = None,
) -> dict:
    """Say whose convention was followed, and what each metric is, for `write_results`.

    Arguments as in `metrics.chosen_metrics`, and what it returns.
    """
    about: dict[str, Any] = {
        "convention": convention(protocol).title,
        "definitions": {metric.name: metric.definition for metric in metrics},
    }
    rule, names = surface_rule, [metric.name for metric in metrics if metric.surfaces]
    if rule is None or not names:
        return about
    about["surface_spacing"] = rule.spacing
    about["cut_faces"] = "count" if rule.cut_faces else "ignore"
    if "surface_dice" in names:
        about["surface_tolerance_mm"] = rule.tolerance or "smallest side of a voxel"
    return about


def _head(about):
    """Return the lines that say what the numbers of a table are."""
    if "convention" not in about:
        return
    yield f"Convention: {about['convention']}"
    for name, definition in about["definitions"].items():
        line = f"  {METRICS[name].heading}: {definition or '(not described)'}"
        yield textwrap.fill(line, 96, subsequent_indent="    ")
    if "surface_tolerance_mm" in about:
        tolerance = about["surface_tolerance_mm"]
        unit = "" if isinstance(tolerance, str) else " mm"
        yield f"  Tolerance of surface Dice: {tolerance}{unit}"
    if about.get("surface_spacing"):
        sides = " x ".join(f"{side:g}" for side in about["surface_spacing"])
        yield f"  Surfaces as if voxels measured {sides} mm"
    if "cut_faces" not in about:
        yield "  Surfaces were not compared"
    else:
        counted = about["cut_faces"] == "count"
        yield (
            "  Faces where the scan cuts a structure "
            + ("count as surface" if counted else "are left out (--cut_faces=ignore)")
        )


def write_per_class(path: Path, evaluation: Evaluation) -> None:
    """Write `tables.class_rows` as CSV, with empty cells for NaN."""
    rows = tables.class_rows(evaluation)
    _write_csv(path, [rows[0], *(row.values() for row in rows)])


def write_per_case(path: Path, evaluation: Evaluation) -> None:
    """Write `tables.case_rows` as CSV: a column for each group, empty cells for NaN."""
    counts = ("classes", "missed", "false_positives")
    others = [name for name in METRICS if name != DICE.name]
    table = [["case", *evaluation.groups, "overall", *counts, *others, "seconds"]]
    for row in tables.case_rows(evaluation):
        values = [row["case"], *row["dice"].values(), *(row[name] for name in counts)]
        values += [row["means"][name] for name in others]
        table.append([*values, _seconds(row["seconds"], digits=2)])
    _write_csv(path, table)


def write_json(path: Path, evaluation: Evaluation, *, about: dict) -> None:
    """Write all means, the scores of every (case, class) pair and what was evaluated.

    `about` is copied into the file.
    """

    def name_of(number):
        return labels.class_name(number, evaluation.names)

    def case_of(result, lost, wrong):
        return {
            name: {name_of(k): scores[k] for k in range(1, len(scores))}
            for name, scores in result.scores.items()
        } | {
            "missed": [name_of(k) for k in np.flatnonzero(lost)],
            "false_positives": [name_of(k) for k in np.flatnonzero(wrong)],
            "seconds": round(result.seconds, 3),
            "grid": result.grid,
            "truth": truth_of(result),
            "notes": result.notes,
            "warnings": result.warnings,
        }

    def truth_of(result):
        if result.truth is None:
            return {}
        pairs = zip(result.counts.truth.tolist(), result.truth.tolist(), strict=True)
        return {name_of(k): own for k, own in enumerate(pairs) if k and own[0]}

    means = {metric.name: evaluation.means(metric) for metric in evaluation.measured()}
    scores, wrong = evaluation.scores(DICE), evaluation.false_positives()
    groups, rule, missed = evaluation.groups, evaluation.rule, evaluation.missed()
    cases = zip(evaluation.results, missed, wrong, strict=True)
    content = {
        **about,
        "average": rule,
        "averages": AVERAGES,
        **{name: means.get(name) for name in METRICS},
        "dice_by_average": group_averages(scores, groups=groups),
        "dice_intervals": bootstrap_intervals(scores, groups=groups, rule=rule),
        "missed": int(missed.sum()),
        "false_positives": int(wrong.sum()),
        "groups": {name: [name_of(k) for k in ids] for name, ids in groups.items()},
        "cases": {result.name: case_of(result, *own) for result, *own in cases},
    }
    files.write_json(path, _plain(content))


def _page(evaluation, views, *, table, about, pages):
    """Return report.html: the table, every class and case, and the worst cases."""
    ranked = sorted(
        zip(tables.case_rows(evaluation), views, strict=True),
        key=lambda pair: np.nan_to_num(pair[1].dice, nan=2.0),
    )
    drawn = [
        (view, pictures.draw_case(view, evaluation.names)) for _, view in ranked[:WORST]
    ]
    rows = tables.class_rows(evaluation)
    ungrouped = {row["id"] for row in rows}.difference(*evaluation.groups.values())
    groups = {**evaluation.groups, "in no group": sorted(ungrouped)}
    return html.render(
        "evaluation.html",
        title="Evaluation",
        table=table,
        dice=DICE,
        others=evaluation.measured()[1:],
        cases=[row | {"time": _seconds(row["seconds"], digits=1)} for row, _ in ranked],
        pages=pages,
        warnings={r.name: r.warnings for r in evaluation.results if r.warnings},
        worst=[(view, html.png(f, facecolor="black")) for view, f in drawn],
        classes={name: [rows[k - 1] for k in ids] for name, ids in groups.items()},
        about={k: v for k, v in about.items() if k != "definitions"},
    )


def _write_csv(path, rows):
    def cell(value):
        if isinstance(value, float):
            return "" if math.isnan(value) else f"{value:.6f}"
        return value

    text = csv_text.as_csv([cell(value) for value in row] for row in rows)
    files.write_text(path, text)


def _seconds(value: float, *, digits: int) -> str:
    """Return seconds as text, empty where nothing was segmented."""
    return "" if math.isnan(value) else f"{value:.{digits}f}"


def _plain(value):
    """Plain types for JSON, which lacks NaN (null here) and infinity ("inf")."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, (float, np.floating)):
        if math.isinf(value):
            return str(float(value))
        return None if math.isnan(value) else round(float(value), 6)
    return value
