"""Ground truth beside prediction: the overview, and all planes of a case."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from swinsmt_jax.evaluation.averages import averages
from swinsmt_jax.evaluation.metrics import DICE
from swinsmt_jax.evaluation.run import Segmented
from swinsmt_jax.evaluation.scoring import scores_of
from swinsmt_jax.inference.pictures import (
    INK,
    OPACITY,
    PLANES,
    ROW_INCHES,
    View,
    colors_of,
    cut,
    draw,
    save,
)


@dataclass(frozen=True)
class CaseViews:
    """The planes of a case, small enough to be kept for every case of a split."""

    name: str
    dice: float
    views: tuple[View, View, View]


def views_of(case: Segmented) -> CaseViews:
    """Cut the coronal, axial and sagittal plane with most structures of the truth."""
    views = tuple(_view(case, plane) for plane in PLANES)
    dice = averages(scores_of([case.result], DICE))["over_classes"]
    return CaseViews(case.result.name, dice, views)


def choose(cases: Sequence[CaseViews]) -> dict[str, CaseViews]:
    """Return the best, median and worst case by Dice; fewer if there are fewer."""
    ranked = sorted(cases, key=lambda c: np.nan_to_num(c.dice, nan=-1.0), reverse=True)
    if len(ranked) < 3:
        return dict(zip(("best", "worst"), ranked, strict=False))
    return {"best": ranked[0], "median": ranked[len(ranked) // 2], "worst": ranked[-1]}


def write_overview(
    path: Path, cases: Sequence[CaseViews], *, num_classes: int, hu_range: tuple
) -> None:
    """Draw the best, the median and the worst case by Dice and write a PNG.

    Args:
        path: of the picture.
        cases: from `views_of`.
        num_classes: K, which fixes the colours.
        hu_range: HU that the scaled values 0 and 1 stand for.
    """
    rows = choose(cases)
    ratios = _widths(rows.values())
    width = ROW_INCHES * sum(ratios)
    figure = Figure(
        figsize=(width, ROW_INCHES * len(rows) + 0.5), facecolor="black", dpi=110
    )
    axes = figure.subplots(len(rows), 4, squeeze=False, width_ratios=ratios)
    palette = colors_of(num_classes)
    for line, (rank, case) in zip(axes, rows.items(), strict=True):
        for i, view in enumerate(case.views[:2]):
            for j, (name, labels) in enumerate(
                (("ground truth", view.truth), ("prediction", view.prediction))
            ):
                axis = line[2 * i + j]
                draw(axis, view, labels, palette=palette, hu_range=hu_range)
                axis.set_title(f"{view.plane}, {name}", color=INK, fontsize=9)
        caption = case.name if len(cases) == 1 else f"{rank}: {case.name}"
        caption = f"{caption}\nmean Dice {case.dice:.3f}"
        line[0].set_ylabel(caption, color=INK, parse_math=False)  # names may hold a $
    figure.tight_layout(pad=0.6)
    save(figure, path)


def draw_case(
    case: CaseViews, *, num_classes: int, hu_range: Sequence[float]
) -> Figure:
    """Draw all planes of a case, truth beside prediction."""
    ratios = [view.ratio for view in case.views]
    width = 0.7 * ROW_INCHES * 2 * sum(ratios)
    figure = Figure(figsize=(width, 0.7 * ROW_INCHES + 0.4), facecolor="black", dpi=80)
    pairs = [ratio for ratio in ratios for _ in "tp"]
    axes = iter(figure.subplots(1, len(pairs), width_ratios=pairs))
    palette = colors_of(num_classes)
    for view in case.views:
        for name, labels in (("truth", view.truth), ("prediction", view.prediction)):
            axis = next(axes)
            draw(axis, view, labels, palette=palette, hu_range=hu_range)
            axis.set_title(f"{view.plane}, {name}", color=INK, fontsize=8)
    figure.tight_layout(pad=0.5)
    return figure


def panel(case: Segmented) -> np.ndarray:
    """Return CT, truth and prediction of a coronal plane side by side, uint8 [H, W, 3].

    A voxel is a pixel, in the layout of the overview; the CT fills grey levels from its
    darkest to its brightest voxel.
    """
    view = _view(case, "coronal")
    spread = max(float(np.ptp(view.ct)), 1e-6)
    grey = np.repeat(((view.ct - view.ct.min()) / spread)[..., None], 3, axis=-1)
    top = max(int(view.truth.max()), int(view.prediction.max()))
    palette = colors_of(top + 1)
    parts = [grey]
    for labels in (view.truth, view.prediction):
        alpha = OPACITY * (labels > 0)[..., None]
        parts.append((1 - alpha) * grey + alpha * palette[labels])
    return np.round(255 * np.concatenate(parts, axis=1)).astype(np.uint8)


def _view(case: Segmented, plane: str) -> View:
    return cut(plane, case.image, case.truth, case.prediction, case.spacing)


def _widths(cases) -> list[float]:
    """Widths of the four columns for rows of height 1."""
    return [max(case.views[i].ratio for case in cases) for i in (0, 0, 1, 1)]
