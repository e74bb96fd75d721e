"""Ground truth beside prediction: the overview, and all planes of a case."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from swinsmt_jax.data.volume import spacing_of
from swinsmt_jax.evaluation.metrics import DICE
from swinsmt_jax.evaluation.scoring import Segmented
from swinsmt_jax.inference.pictures import (
    INK,
    PLANES,
    ROW_INCHES,
    View,
    cut,
    draw,
    over,
    save,
)
from swinsmt_jax.labels import CLASS_NAMES


@dataclass(frozen=True)
class CaseViews:
    """The planes of a case, small enough to be kept for every case of a split."""

    name: str
    dice: float
    views: tuple[View, ...]  # coronal, axial, sagittal


def views_of(case: Segmented) -> CaseViews:
    """Cut the coronal, axial and sagittal plane with most structures of the truth."""
    views = tuple(_view(case, plane) for plane in PLANES)
    return CaseViews(case.result.name, case.result.mean(DICE), views)


def choose(cases: Sequence[CaseViews]) -> dict[str, CaseViews]:
    """Return the best, median and worst case by Dice; fewer if there are fewer."""
    ranked = sorted(cases, key=lambda c: np.nan_to_num(c.dice, nan=-1.0), reverse=True)
    if len(ranked) < 3:
        return dict(zip(("best", "worst"), ranked, strict=False))
    return {"best": ranked[0], "median": ranked[len(ranked) // 2], "worst": ranked[-1]}


def write_overview(
    path: Path, cases: Sequence[CaseViews], names: Sequence[str] = CLASS_NAMES
) -> None:
    """Draw the best, the median and the worst case by Dice and write a PNG."""
    chosen = choose(cases)
    rows = [case.views[:2] for case in chosen.values()]
    figure, axes = _panels(rows, scale=1, names=names)
    for axis, (rank, case) in zip(axes[:, 0], chosen.items(), strict=True):
        caption = case.name if len(cases) == 1 else f"{rank}: {case.name}"
        caption = f"{caption}\nmean Dice {case.dice:.3f}"
        axis.set_ylabel(caption, color=INK, parse_math=False)  # names may hold a $
    figure.tight_layout(pad=0.6)
    save(figure, path)


def draw_case(case: CaseViews, names: Sequence[str] = CLASS_NAMES) -> Figure:
    """Draw all planes of a case, truth beside prediction."""
    figure, _ = _panels([case.views], scale=0.7, names=names)
    figure.tight_layout(pad=0.5)
    return figure


def panel(case: Segmented, names: Sequence[str] = CLASS_NAMES) -> np.ndarray:
    """Return CT, truth and prediction of a coronal plane side by side, uint8 [H, W, 3].

    A voxel is a pixel, in the layout of the overview; the CT fills grey levels from its
    darkest to its brightest voxel.
    """
    view = _view(case, "coronal")
    ct = view.ct.astype(np.float32)
    grey = (ct - ct.min()) / max(np.ptp(ct), 1e-6)
    shown = (np.zeros_like(view.truth), view.truth, view.prediction)
    parts = [over(grey, labels, names) for labels in shown]
    return np.round(255 * np.concatenate(parts, axis=1)).astype(np.uint8)


def _view(case: Segmented, plane: str) -> View:
    scan, spacing = case.scan, spacing_of(case.scan.affine)
    return cut(plane, scan.image, scan.label, case.prediction, spacing)


def _panels(rows: Sequence[Sequence[View]], *, scale: float, names: Sequence[str]):
    """Draw each row's views, truth beside prediction; return figure and axes."""
    ratios = [max(v.ratio for v in views) for views in zip(*rows, strict=True)]
    ratios = [ratio for ratio in ratios for _ in "tp"]
    height = scale * ROW_INCHES
    size = height * sum(ratios), height * len(rows) + 0.5
    figure = Figure(figsize=size, facecolor="black", dpi=110 if scale == 1 else 80)
    axes = figure.subplots(len(rows), len(ratios), squeeze=False, width_ratios=ratios)
    for line, views in zip(axes, rows, strict=True):
        for i, view in enumerate(views):
            for axis, name in zip(line[2 * i :], ("truth", "prediction"), strict=False):
                title = f"{view.plane}, {name}"
                draw(axis, view, getattr(view, name), title=title, names=names)
    return figure, axes
