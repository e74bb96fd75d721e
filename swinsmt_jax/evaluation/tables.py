"""The Dice table, and the CSV and JSON files behind it."""

import csv
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from swinsmt_jax import labels
from swinsmt_jax.evaluation import metrics, published_results, run
from swinsmt_jax.evaluation.run import CaseResult
from swinsmt_jax.runtime import files

Groups = Mapping[str, Sequence[int]]
RULES = {
    "over_classes": "mean over cases of each class, then over classes",
    "over_cases": "mean over classes present in each case, then over cases",
    "over_pairs": "mean over all (case, class) pairs",
}
REPORTED = (
    f"Reported: by {published_results.SOURCE}, on TotalSegmentator-V2.\n"
    "The paper does not say how it averages: its overall "
    f"{published_results.ROWS[-1]['dice']['overall']:.2f} "
    "is not the mean of its groups.\n"
    "Which classes are in a group is not published either."
)


def dice_table(
    results: Sequence[CaseResult], *, groups: Groups, rule: str, title: str
) -> str:
    """Format Dice by group in per cent, one row for each rule of averaging.

    The row of `rule` comes first and is marked. Below stand how many classes of each
    group have a value, and what no average shows: classes predicted though absent; then
    the 95 % bootstrap interval over cases of the marked row, and the surface Dice under
    the same rule, if there is one. Where the groups are the paper's, its authors' rows
    end the table.
    """
    scores, wrong = run.dice_scores(results), run.false_positives(results)
    surfaces = run.surface_scores(results)
    intervals = metrics.bootstrap_intervals(scores, groups=groups, rule=rule)
    means = metrics.group_averages(scores, groups=groups)
    rules = [rule, *(r for r in metrics.AVERAGES if r != rule)]
    members = {**groups, "overall": range(1, scores.shape[1])}
    valued = ~np.isnan(scores).all(axis=0)
    rows = [
        ["Dice (%)", *means],
        *(
            [
                f"{'>' if r == rule else ' '} {r}",
                *(_percent(m[r]) for m in means.values()),
            ]
            for r in rules
        ),
        [
            "  classes with a value",
            *(f"{valued[list(ids)].sum()}/{len(ids)}" for ids in members.values()),
        ],
        [
            "  predicted though absent",
            *(str(wrong[:, list(ids)].sum()) for ids in members.values()),
        ],
        ["  95 % interval", *map(_interval, intervals.values())],
    ]
    if surfaces is not None:
        found = metrics.group_averages(surfaces, groups=groups)
        rows.append(["  surface Dice", *(_percent(m[rule]) for m in found.values())])
    theirs = dict(groups) == labels.GROUPS
    if theirs:
        rows.append(["Reported, by the authors", *("" for _ in means)])
        for row in published_results.ROWS:
            cells = (f"{row['dice'][name]:.2f}" for name in means)
            rows.append([f"  {row['network']}", *cells])
    notes = [f"{'>' if r == rule else ' '} {r}: {RULES[r]}" for r in rules]
    absent = (
        f"Predicted though absent from the truth: {wrong.sum()} (case, class) pairs, "
        f"{wrong.any(axis=0).sum()} classes.\nThey have no Dice and are in no mean."
    )
    source = [REPORTED] if theirs else []
    return "\n".join([title, *_aligned(rows), *notes, absent, *source])


def write_per_class(
    path: Path,
    results: Sequence[CaseResult],
    *,
    groups: Groups,
    names: Sequence[str] = labels.CLASS_NAMES,
) -> None:
    """Write a row for each class but the background; `names` are those of the ids.

    Columns: id, name, groups, mean, least and greatest Dice over the cases that have
    the class, their number, in how many of them it was missed altogether, in how many
    of the others it was predicted, and the mean surface Dice, empty if not measured.
    """
    scores, wrong = run.dice_scores(results), run.false_positives(results)
    surfaces = run.surface_scores(results)
    surfaces = np.full_like(scores, np.nan) if surfaces is None else surfaces
    surfaces = metrics.class_means(surfaces)
    predicted = np.stack([r.counts.predicted for r in results])
    header = "id,class,groups,dice,dice_min,dice_max,cases,missed,false_positives,"
    header += "surface_dice"
    rows = []
    for k in range(1, scores.shape[1]):
        present = ~np.isnan(scores[:, k])
        values = scores[present, k]
        extremes = (values.min(), values.max()) if values.size else (math.nan,) * 2
        rows.append(
            [
                k,
                labels.class_name(k, names),
                " ".join(name for name, ids in groups.items() if k in ids),
                *map(_number, (metrics.class_means(scores)[k], *extremes)),
                present.sum(),
                (present & (predicted[:, k] == 0)).sum(),
                wrong[:, k].sum(),
                _number(surfaces[k]),
            ]
        )
    _write_csv(path, header.split(","), rows)


def write_per_case(
    path: Path, results: Sequence[CaseResult], *, groups: Groups
) -> None:
    """Write a row for each case: mean Dice by group over the classes it has.

    Further columns: how many classes it has, how many were missed, how many predicted
    though absent, the mean surface Dice, empty if not measured, and the seconds that
    the prediction took.
    """
    header = ["case", *groups, "overall", "classes", "missed", "false_positives"]
    header += ["surface_dice", "seconds"]
    rows = []
    for result in results:
        scores, counts = metrics.dice(result.counts)[None], result.counts
        means = metrics.group_averages(scores, groups=groups)
        present = counts.truth[1:] > 0
        rows.append(
            [
                result.name,
                *(_number(mean["over_classes"]) for mean in means.values()),
                present.sum(),
                (present & (counts.predicted[1:] == 0)).sum(),
                metrics.false_positive_classes(counts).sum(),
                _number(mean_surface(result)),
                seconds(result, digits=2),
            ]
        )
    _write_csv(path, header, rows)


def write_json(
    path: Path,
    results: Sequence[CaseResult],
    *,
    groups: Groups,
    rule: str,
    about: dict,
    names: Sequence[str] = labels.CLASS_NAMES,
) -> None:
    """Write all means, the Dice of every (case, class) pair and what was evaluated.

    Args:
        path: of the file.
        results: of the cases.
        groups: class ids of each group.
        rule: the average that counts as the result.
        about: plain values that say what was evaluated; copied into the file.
        names: of the label ids.
    """

    def name_of(number):
        return labels.class_name(number, names)

    scores, wrong = run.dice_scores(results), run.false_positives(results)
    surfaces = run.surface_scores(results)
    means = metrics.group_averages(scores, groups=groups)
    content = {
        **about,
        "average": rule,
        "averages": RULES,
        "dice": {name: mean[rule] for name, mean in means.items()},
        "dice_by_average": means,
        "dice_intervals": metrics.bootstrap_intervals(scores, groups=groups, rule=rule),
        "surface_dice": None
        if surfaces is None
        else {
            name: mean[rule]
            for name, mean in metrics.group_averages(surfaces, groups=groups).items()
        },
        "false_positives": int(wrong.sum()),
        "groups": {name: [name_of(k) for k in ids] for name, ids in groups.items()},
        "cases": {
            result.name: {
                "dice": {name_of(k): row[k] for k in range(1, len(row))},
                "false_positives": [name_of(k) for k in np.flatnonzero(extra)],
                "seconds": round(result.seconds, 3),
            }
            | _surface_of(result, name_of)
            for result, row, extra in zip(results, scores, wrong, strict=True)
        },
    }
    files.write_json(path, _plain(content))


def _surface_of(result, name_of):
    if result.surface is None:
        return {}
    found = {name_of(k): x for k, x in enumerate(result.surface) if k}
    return {"surface_dice": found}


def mean_surface(result: CaseResult) -> float:
    """Mean surface Dice over the classes of a case; NaN if it was not measured."""
    if result.surface is None:
        return math.nan
    return metrics.averages(result.surface[None])["over_classes"]


def _write_csv(path: Path, header: list[str], rows: list[list]) -> None:
    with files.replacing(path) as partial, partial.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerows([header, *rows])


def _aligned(rows: list[list[str]]) -> list[str]:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = [
        "  ".join(
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
    rule = "-" * len(lines[0])
    return [rule, lines[0], rule, *lines[1:], rule]


def _percent(value: float) -> str:
    return "-" if math.isnan(value) else f"{100 * value:.2f}"


def _interval(ends: tuple[float, float]) -> str:
    low, high = ends
    return "-" if math.isnan(low) else f"{100 * low:.1f}-{100 * high:.1f}"


def seconds(result: CaseResult, *, digits: int) -> str:
    """Return a case's seconds as text, empty where nothing was segmented."""
    return "" if math.isnan(result.seconds) else f"{result.seconds:.{digits}f}"


def _number(value: float) -> str:
    return "" if math.isnan(value) else f"{value:.6f}"


def _plain(value):
    """Plain types for JSON; NaN, which JSON lacks, becomes null."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, (float, np.floating)):
        return None if math.isnan(value) else round(float(value), 6)
    return value
