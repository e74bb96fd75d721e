"""The files of an evaluation: results.json, CSV tables, a picture and a report."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from swinsmt_jax import checks, labels
from swinsmt_jax.evaluation import html_report, pictures, tables
from swinsmt_jax.evaluation.averages import (
    AVERAGES,
    bootstrap_intervals,
    group_averages,
)
from swinsmt_jax.evaluation.metrics import DICE, METRICS
from swinsmt_jax.evaluation.scoring import (
    CaseResult,
    false_positives,
    measured,
    scores_of,
)
from swinsmt_jax.evaluation.surface import SurfaceRule
from swinsmt_jax.runtime import files, processes


def write_results(
    output: Path,
    results: Sequence[CaseResult],
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
    table = tables.dice_table(results, groups=groups, rule=rule, title=title)
    if "surface_tolerance_mm" in about:
        table += f"\nSurface Dice: within {about['surface_tolerance_mm']:g} mm."
    table = f"{table}\n{note}".rstrip()
    named = {"groups": groups, "names": names}
    drawn = {"num_classes": num_classes, "hu_range": hu_range}

    def write():
        tables.write_per_class(output / "per_class.csv", results, **named)
        tables.write_per_case(output / "per_case.csv", results, groups=groups)
        path = output / "results.json"
        write_json(path, results, rule=rule, about=about, **named)
        pictures.write_overview(output / "overview.png", views, **drawn)
        path = output / "report.html"
        options = {"table": table, "about": about, **named, **drawn}
        html_report.write(path, results, views, **options)

    first = processes.is_first()
    processes.together(lambda: write() if first else None)
    return table


def write_json(
    path: Path,
    results: Sequence[CaseResult],
    *,
    groups: Mapping[str, Sequence[int]],
    rule: str,
    about: dict,
    names: Sequence[str] = labels.CLASS_NAMES,
) -> None:
    """Write all means, the scores of every (case, class) pair and what was evaluated.

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

    def means_of(metric):
        found = group_averages(scores_of(results, metric), groups=groups)
        return {name: mean[rule] for name, mean in found.items()}

    def case_of(result, wrong):
        return {
            name: {name_of(k): scores[k] for k in range(1, len(scores))}
            for name, scores in result.scores.items()
        } | {
            "false_positives": [name_of(k) for k in np.flatnonzero(wrong)],
            "seconds": round(result.seconds, 3),
        }

    known, wrong = measured(results), false_positives(results)
    scores = scores_of(results, DICE)
    content = {
        **about,
        "average": rule,
        "averages": AVERAGES,
        **{m.name: means_of(m) if m in known else None for m in METRICS.values()},
        "dice_by_average": group_averages(scores, groups=groups),
        "dice_intervals": bootstrap_intervals(scores, groups=groups, rule=rule),
        "false_positives": int(wrong.sum()),
        "groups": {name: [name_of(k) for k in ids] for name, ids in groups.items()},
        "cases": {r.name: case_of(r, w) for r, w in zip(results, wrong, strict=True)},
    }
    files.write_json(path, _plain(content))


def about_surfaces(rule: SurfaceRule | None) -> dict:
    """Say in results.json how surfaces were compared."""
    if rule is None:
        return {}
    return {"surface_tolerance_mm": rule.tolerance, "surface_spacing": rule.spacing}


def make_folder(path: Path) -> None:
    """Make a folder and those above it; a `UserError` if something is in the way."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise checks.UserError(
            f"the output folder {path} cannot be made: {error.strerror}; "
            "choose another."
        ) from error


def _plain(value):
    """Plain types for JSON; NaN and infinity, which JSON lacks, become null."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, (float, np.floating)):
        return round(float(value), 6) if math.isfinite(value) else None
    return value
