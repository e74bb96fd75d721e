"""The results of an evaluation as a table of text, and as CSV files.

All of them loop over `metrics.METRICS`. Dice comes first, and alone has extremes,
intervals and every rule of averaging.
"""

import csv
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from swinsmt_jax import labels
from swinsmt_jax.evaluation import published_results
from swinsmt_jax.evaluation.averages import (
    AVERAGES,
    averages,
    bootstrap_intervals,
    class_means,
    group_averages,
)
from swinsmt_jax.evaluation.metrics import DICE, METRICS
from swinsmt_jax.evaluation.scoring import (
    CaseResult,
    false_positives,
    measured,
    scores_of,
)
from swinsmt_jax.runtime import files

Groups = Mapping[str, Sequence[int]]


def dice_table(
    results: Sequence[CaseResult], *, groups: Groups, rule: str, title: str
) -> str:
    """Format Dice by group in per cent, one row for each rule of averaging.

    The row of `rule` comes first and is marked. Below stand how many classes of each
    group have a value, and what no average shows: classes predicted though absent; then
    the 95 % bootstrap interval over cases of the marked row, and the other metrics
    under the same rule. Where the groups are the paper's, its authors' rows end the
    table.
    """
    scores, wrong = scores_of(results, DICE), false_positives(results)
    intervals = bootstrap_intervals(scores, groups=groups, rule=rule)
    means = group_averages(scores, groups=groups)
    members = [list(ids) for ids in groups.values()] + [list(range(1, len(wrong[0])))]
    valued = ~np.isnan(scores).all(axis=0)
    rules = {f"{'>' if r == rule else ' '} {r}": r for r in _first(rule)}
    rows = [
        ["Dice (%)", *means],
        *([k, *(DICE.text(m[r]) for m in means.values())] for k, r in rules.items()),
        ["  classes with a value", *(f"{valued[i].sum()}/{len(i)}" for i in members)],
        ["  predicted though absent", *(str(wrong[:, i].sum()) for i in members)],
        ["  95 % interval", *map(_interval, intervals.values())],
    ]
    for metric in measured(results):
        if metric is not DICE:
            found = group_averages(scores_of(results, metric), groups=groups)
            cells = (metric.text(mean[rule]) for mean in found.values())
            rows.append([f"  {metric.heading}", *cells])
    notes = [f"{label}: {AVERAGES[r]}" for label, r in rules.items()]
    notes.append(
        f"Predicted though absent from the truth: {wrong.sum()} (case, class) pairs, "
        f"{wrong.any(axis=0).sum()} classes.\nThey have no Dice and are in no mean."
    )
    if dict(groups) == labels.GROUPS:
        rows += published_results.table_rows(means)
        notes.append(published_results.NOTE)
    return "\n".join([title, *_aligned(rows), *notes])


def class_rows(
    results: Sequence[CaseResult], *, groups: Groups, names: Sequence[str]
) -> list[dict]:
    """Return a row for each class but the background; `names` are those of the ids.

    Columns: id, class, groups, mean, least and greatest Dice over the cases that have
    the class, their number, in how many of them it was missed altogether, in how many
    of the others it was predicted, and the means of the other metrics, NaN if unknown.
    """
    scores, wrong = scores_of(results, DICE), false_positives(results)
    predicted = np.stack([r.counts.predicted for r in results])
    means = {m.name: class_means(scores_of(results, m)) for m in METRICS.values()}
    rows = []
    for k in range(1, scores.shape[1]):
        present = ~np.isnan(scores[:, k])
        values = scores[present, k] if present.any() else np.array([math.nan])
        row = {
            "id": k,
            "class": labels.class_name(k, names),
            "groups": " ".join(name for name, ids in groups.items() if k in ids),
            "dice": means["dice"][k],
            "dice_min": values.min(),
            "dice_max": values.max(),
            "cases": present.sum(),
            "missed": (present & (predicted[:, k] == 0)).sum(),
            "false_positives": wrong[:, k].sum(),
        }
        rows.append(row | {name: mean[k] for name, mean in means.items()})
    return rows


def case_rows(results: Sequence[CaseResult], *, groups: Groups) -> list[dict]:
    """Return a row for each case.

    Columns: case; dice, the mean in each group over the classes that the case has; how
    many classes it has, how many were missed, how many predicted though absent; means,
    of every metric over its classes; and the seconds that the prediction took.
    """
    rows = []
    for result, wrong in zip(results, false_positives(results), strict=True):
        present = result.counts.truth[1:] > 0
        dice = group_averages(scores_of([result], DICE), groups=groups)
        means = {m.name: averages(scores_of([result], m)) for m in METRICS.values()}
        row = {
            "case": result.name,
            "dice": {name: mean["over_classes"] for name, mean in dice.items()},
            "classes": present.sum(),
            "missed": (present & (result.counts.predicted[1:] == 0)).sum(),
            "false_positives": wrong.sum(),
            "means": {name: mean["over_classes"] for name, mean in means.items()},
            "seconds": result.seconds,
        }
        rows.append(row)
    return rows


def write_per_class(
    path: Path,
    results: Sequence[CaseResult],
    *,
    groups: Groups,
    names: Sequence[str] = labels.CLASS_NAMES,
) -> None:
    """Write `class_rows`, with empty cells for NaN."""
    rows = class_rows(results, groups=groups, names=names)
    _write_csv(path, list(rows[0]), [row.values() for row in rows])


def write_per_case(
    path: Path, results: Sequence[CaseResult], *, groups: Groups
) -> None:
    """Write `case_rows`, with a column for each group and empty cells for NaN."""
    counts = ("classes", "missed", "false_positives")
    others = [name for name in METRICS if name != DICE.name]
    rows = [
        [
            row["case"],
            *row["dice"].values(),
            *(row[name] for name in counts),
            *(row["means"][name] for name in others),
            seconds(row["seconds"], digits=2),
        ]
        for row in case_rows(results, groups=groups)
    ]
    header = ["case", *groups, "overall", *counts, *others, "seconds"]
    _write_csv(path, header, rows)


def seconds(value: float, *, digits: int) -> str:
    """Return a case's seconds as text, empty where nothing was segmented."""
    return "" if math.isnan(value) else f"{value:.{digits}f}"


def _first(rule):
    return [rule, *(r for r in AVERAGES if r != rule)]


def _write_csv(path, header, rows):
    def cell(value):
        if isinstance(value, float):
            return "" if math.isnan(value) else f"{value:.6f}"
        return value

    with files.replacing(path) as partial, partial.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerows([header, *([cell(value) for value in row] for row in rows)])


def _aligned(rows: list[list[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "  ".join(
            cell.rjust(width) if i else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
    rule = "-" * len(lines[0])
    return [rule, lines[0], rule, *lines[1:], rule]


def _interval(ends: tuple[float, float]) -> str:
    low, high = ends
    return "-" if math.isnan(low) else f"{100 * low:.1f}-{100 * high:.1f}"
