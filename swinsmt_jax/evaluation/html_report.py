"""The report of an evaluation as one HTML file that needs no other."""

import base64
import html
import io
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from swinsmt_jax import labels
from swinsmt_jax.evaluation import metrics, pictures, run, tables
from swinsmt_jax.evaluation.pictures import CaseViews
from swinsmt_jax.evaluation.run import CaseResult
from swinsmt_jax.runtime import files

WORST = 5  # cases drawn
STYLE = """body { font: 14px sans-serif; margin: 2em auto; max-width: 75em }
pre { background: #f4f4f4; padding: 1em; overflow-x: auto }
table { border-collapse: collapse }
td, th { text-align: right; padding: .1em .8em; white-space: nowrap }
td:first-child, th:first-child { text-align: left }
.bar { width: 22em; padding: 0 } .bar div { background: #3b7dd8; height: .8em }
img { max-width: 100% }"""


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
        about: what was evaluated, as in `tables.write_json`.
        num_classes, hu_range: as in `pictures.write_overview`.
    """
    ranked = sorted(
        zip(results, views, strict=True),
        key=lambda pair: np.nan_to_num(pair[1].dice, nan=2.0),
    )
    drawn = "".join(
        f"<h3>{html.escape(view.name)}, mean Dice {view.dice:.3f}</h3>"
        + _image(pictures.draw_case(view, num_classes=num_classes, hu_range=hu_range))
        for _, view in ranked[:WORST]
    )
    facts = "".join(_row([key, value]) for key, value in about.items())
    page = f"""<!doctype html><html lang="en"><meta charset="utf-8">
<title>Evaluation</title><style>{STYLE}</style><h1>Evaluation</h1>
<pre>{html.escape(table)}</pre>
<p>All numbers: <a href="per_class.csv">per_class.csv</a>,
<a href="per_case.csv">per_case.csv</a>, <a href="results.json">results.json</a>;
best, median and worst case: <a href="overview.png">overview.png</a>.</p>
<h2>Cases, the worst first</h2>{_cases([result for result, _ in ranked])}
<h2>The worst cases</h2>{drawn}
<h2>Classes</h2>{_classes(results, groups, names)}
<h2>What was evaluated</h2><table>{facts}</table></html>
"""
    files.write_text(path, page)


def _cases(results):
    rows = [_row("case,Dice,surface Dice,classes,missed,invented,s".split(","), "th")]
    for result in results:
        scores, counts = metrics.dice(result.counts)[None], result.counts
        present = counts.truth[1:] > 0
        rows.append(
            _row(
                [
                    result.name,
                    _percent(metrics.averages(scores)["over_classes"]),
                    _percent(tables.mean_surface(result)),
                    present.sum(),
                    (present & (counts.predicted[1:] == 0)).sum(),
                    metrics.false_positive_classes(counts).sum(),
                    tables.seconds(result, digits=1),
                ]
            )
        )
    return f"<table>{''.join(rows)}</table>"


def _classes(results, groups, names):
    scores, surfaces = run.dice_scores(results), run.surface_scores(results)
    means = metrics.class_means(scores)
    surfaces = means * math.nan if surfaces is None else metrics.class_means(surfaces)
    present = (~np.isnan(scores)).sum(axis=0)
    others = set(range(1, len(means))) - {k for ids in groups.values() for k in ids}
    parts = []
    for group, ids in {**groups, "in no group": sorted(others)}.items():
        if not ids:
            continue
        rows = [_row(["class", "Dice", "", "surface Dice", "cases"], "th")]
        for k in ids:
            width = 0 if math.isnan(means[k]) else 100 * means[k]
            bar = f'<td class="bar"><div style="width:{width:.1f}%"></div></td>'
            cells = [labels.class_name(k, names), _percent(means[k])]
            more = [_percent(surfaces[k]), present[k]]
            rows.append(f"<tr>{_cells(cells)}{bar}{_cells(more)}</tr>\n")
        parts.append(f"<h3>{html.escape(group)}</h3><table>{''.join(rows)}</table>")
    return "".join(parts)


def _row(cells, tag="td"):
    return f"<tr>{_cells(cells, tag)}</tr>\n"


def _cells(cells, tag="td"):
    return "".join(f"<{tag}>{html.escape(str(cell))}</{tag}>" for cell in cells)


def _image(figure):
    file = io.BytesIO()
    figure.savefig(file, format="png", facecolor=figure.get_facecolor())
    content = base64.b64encode(file.getvalue()).decode()
    return f'<img src="data:image/png;base64,{content}" alt="truth and prediction">'


def _percent(value):
    return "–" if math.isnan(value) else f"{100 * value:.1f}"
