"""The report of an evaluation as one HTML file that needs no other."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from swinsmt_jax.evaluation import pictures, tables
from swinsmt_jax.evaluation.metrics import DICE, METRICS
from swinsmt_jax.evaluation.pictures import CaseViews
from swinsmt_jax.evaluation.scoring import CaseResult
from swinsmt_jax.runtime import files, html

WORST = 5  # cases drawn


def write(
    path: Path,
    results: Sequence[CaseResult],
    views: Sequence[CaseViews],
    *,
    table: str,
    groups: Mapping[str, Sequence[int]],
    names: Sequence[str],
    about: Mapping,
    num_classes: int,
    hu_range: Sequence[float],
) -> None:
    """Write the table, every class and case, and pictures of the worst cases.

    Args:
        path: of the file.
        results: of the cases.
        views: of the same cases, in the same order.
        table: text as from `tables.dice_table`.
        groups: class ids of each group.
        names: of the label ids.
        about: what was evaluated, as in `results.write_json`.
        num_classes, hu_range: as in `pictures.write_overview`.
    """
    ranked = sorted(
        zip(tables.case_rows(results, groups=groups), views, strict=True),
        key=lambda pair: np.nan_to_num(pair[1].dice, nan=2.0),
    )
    drawn = [
        (view, pictures.draw_case(view, num_classes=num_classes, hu_range=hu_range))
        for _, view in ranked[:WORST]
    ]
    rows = tables.class_rows(results, groups=groups, names=names)
    ungrouped = {row["id"] for row in rows}.difference(*groups.values())
    members = {**groups, "in no group": sorted(ungrouped)}
    page = html.render(
        "evaluation.html",
        title="Evaluation",
        table=table,
        dice=DICE,
        others=[metric for metric in METRICS.values() if metric is not DICE],
        cases=[
            row | {"seconds": tables.seconds(row["seconds"], digits=1)}
            for row, _ in ranked
        ],
        worst=[(view, html.png(f, facecolor="black")) for view, f in drawn],
        classes={name: [rows[k - 1] for k in ids] for name, ids in members.items()},
        about=about,
    )
    files.write_text(path, page)
