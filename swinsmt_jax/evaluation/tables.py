"""The results of an evaluation as a table of text, and as rows for files.

All of them loop over `metrics.METRICS`. Dice comes first, and alone has extremes,
intervals and every rule of averaging.
"""

import math

import numpy as np

from swinsmt_jax import labels
from swinsmt_jax.evaluation import published_results
from swinsmt_jax.evaluation.averages import (
    AVERAGES,
    bootstrap_intervals,
    group_averages,
    known_mean,
)
from swinsmt_jax.evaluation.metrics import DICE, METRICS
from swinsmt_jax.evaluation.overlap import missed_classes
from swinsmt_jax.evaluation.scoring import Evaluation


def dice_table(evaluation: Evaluation, *, title: str, reported: bool = False) -> str:
    """Format Dice by group in per cent, one row for each rule of averaging.

    The row of the evaluation's rule comes first and is marked. The next rows count the
    classes of each group that have a value, and the (case, class) pairs that were
    missed or that were predicted though absent, which no average shows. Then come the
    marked row's 95 % bootstrap interval over cases, and the other metrics under the
    same rule. With `reported`, the table ends with the authors' rows, but only if its
    groups are those of the paper, since they are figures of TotalSegmentator-V2.
    """
    groups, rule = evaluation.groups, evaluation.rule
    scores, wrong = evaluation.scores(DICE), evaluation.false_positives()
    missed = evaluation.missed()
    intervals = bootstrap_intervals(scores, groups=groups, rule=rule)
    means = group_averages(scores, groups=groups)
    members = [list(ids) for ids in groups.values()] + [list(range(1, len(wrong[0])))]
    valued = ~np.isnan(scores).all(axis=0)
    others = [r for r in AVERAGES if r not in (rule, "over_all_classes")]
    rules = {f"> {rule}": rule} | {f"  {r}": r for r in others}
    rows = [
        ["Dice (%)", *means],
        *([k, *(DICE.text(m[r]) for m in means.values())] for k, r in rules.items()),
        ["  classes with a value", *(f"{valued[i].sum()}/{len(i)}" for i in members)],
        ["  missed altogether", *(str(missed[:, i].sum()) for i in members)],
        ["  predicted though absent", *(str(wrong[:, i].sum()) for i in members)],
        ["  95 % interval", *map(_interval, intervals.values())],
    ]
    for metric in evaluation.measured()[1:]:
        cells = map(metric.text, evaluation.means(metric).values())
        rows.append([f"  {metric.heading}", *cells])
    notes = [f"{label}: {AVERAGES[r]}" for label, r in rules.items()]
    told = (
        "They have no Dice and are in no mean."
        if np.isnan(scores[wrong]).all()
        else "Their scores are in the means, as the convention has it."
    )
    notes.append(
        f"Predicted though absent from the truth: {wrong.sum()} (case, class) pairs, "
        f"{wrong.any(axis=0).sum()} classes.\n{told}"
    )
    truth = np.sum([result.counts.truth for result in evaluation.results], axis=0)
    if absent := np.flatnonzero(truth == 0).tolist():
        names = [labels.class_name(k, evaluation.names) for k in absent[:5]]
        more = ", ..." if len(absent) > 5 else ""
        notes.append(
            f"No case has {len(absent)} of the classes: {', '.join(names)}{more}"
        )
    if reported and dict(groups) == labels.GROUPS:
        rows += published_results.table_rows(means)
        notes.append(published_results.NOTE)
    return "\n".join([title, *_aligned(rows), *notes])


def class_rows(evaluation: Evaluation) -> list[dict]:
    """Return a row for each class but the background.

    Columns: id, class, groups, mean, least and greatest Dice over the cases that have
    the class, their number, in how many of them it was missed altogether, in how many
    of the others it was predicted, and the means of the other metrics, NaN if unknown.
    """
    scores, wrong = evaluation.scores(DICE), evaluation.false_positives()
    missed = evaluation.missed()
    means = {m.name: known_mean(evaluation.scores(m), axis=0) for m in METRICS.values()}
    rows = []
    for k in range(1, scores.shape[1]):
        present = ~np.isnan(scores[:, k])
        values = scores[present, k] if present.any() else np.array([math.nan])
        row = {
            "id": k,
            "class": labels.class_name(k, evaluation.names),
            "groups": " ".join(n for n, ids in evaluation.groups.items() if k in ids),
            "dice": means["dice"][k],
            "dice_min": values.min(),
            "dice_max": values.max(),
            "cases": present.sum(),
            "missed": missed[:, k].sum(),
            "false_positives": wrong[:, k].sum(),
        }
        rows.append(row | {name: mean[k] for name, mean in means.items()})
    return rows


def case_rows(evaluation: Evaluation) -> list[dict]:
    """Return a row for each case.

    Columns: case; dice, the mean in each group over the classes that the case has; how
    many classes it has, how many were missed, how many predicted though absent; means,
    of every metric over its classes; and the seconds that the prediction took.
    """
    rows = []
    pairs = zip(evaluation.results, evaluation.false_positives(), strict=True)
    for result, wrong in pairs:
        present = result.counts.truth[1:] > 0
        row = {
            "case": result.name,
            "dice": Evaluation([result], evaluation.groups).means(DICE),
            "classes": present.sum(),
            "missed": missed_classes(result.counts).sum(),
            "false_positives": wrong.sum(),
            "means": {name: result.mean(m) for name, m in METRICS.items()},
            "seconds": result.seconds,
        }
        rows.append(row)
    return rows


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
