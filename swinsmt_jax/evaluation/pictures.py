"""The overview: ground truth beside prediction, in a coronal and an axial plane.

Shown as radiologists read: the patient's right is on the left of the image, the head
or the front of the body on top, and voxels keep their proportions in millimetres.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib import colors
from matplotlib.figure import Figure

from swinsmt_jax.data.nifti import Volume
from swinsmt_jax.evaluation import metrics
from swinsmt_jax.evaluation.run import Segmented
from swinsmt_jax.evaluation.tables import class_name
from swinsmt_jax.runtime.files import replacing

HU_WINDOW = (-160.0, 240.0)  # soft tissue
OPACITY = 0.55
ARTERIES = ("aorta", "artery", "trunk", "heart", "atrial")
VEINS = ("vein", "vena")
INK = "#d8d8d8"
ROW_INCHES = 4.2


@dataclass(frozen=True)
class View:
    """One plane of a case as arrays of image rows, top row first.

    Attributes:
        plane: "coronal", "axial" or "sagittal".
        ct: HU scaled to [0, 1].
        truth, prediction: class ids.
        extent: width and height in mm.
    """

    plane: str
    ct: np.ndarray
    truth: np.ndarray
    prediction: np.ndarray
    extent: tuple[float, float]


@dataclass(frozen=True)
class CaseViews:
    """The planes of a case, small enough to be kept for every case of a split."""

    name: str
    dice: float
    views: tuple[View, View, View]


def views_of(case: Segmented) -> CaseViews:
    """Cut the coronal, axial and sagittal plane with most structures of the truth."""
    planes = (("coronal", 1), ("axial", 2), ("sagittal", 0))
    views = tuple(_view(case, plane, axis) for plane, axis in planes)
    scores = metrics.dice(case.result.counts)[None]
    return CaseViews(case.result.name, metrics.averages(scores)["over_classes"], views)


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
                _draw(axis, view, labels, palette, hu_range)
                axis.set_title(f"{view.plane}, {name}", color=INK, fontsize=9)
        caption = case.name if len(cases) == 1 else f"{rank}: {case.name}"
        caption = f"{caption}\nmean Dice {case.dice:.3f}"
        line[0].set_ylabel(caption, color=INK, parse_math=False)  # names may hold a $
    figure.tight_layout(pad=0.6)
    with replacing(path) as partial:
        figure.savefig(partial, format="png", facecolor="black")


def draw_case(
    case: CaseViews, *, num_classes: int, hu_range: Sequence[float]
) -> Figure:
    """Draw all planes of a case, truth beside prediction."""
    ratios = [min(max(v.extent[0] / v.extent[1], 0.4), 2.0) for v in case.views]
    width = 0.7 * ROW_INCHES * 2 * sum(ratios)
    figure = Figure(figsize=(width, 0.7 * ROW_INCHES + 0.4), facecolor="black", dpi=80)
    pairs = [ratio for ratio in ratios for _ in "tp"]
    axes = iter(figure.subplots(1, len(pairs), width_ratios=pairs))
    palette = colors_of(num_classes)
    for view in case.views:
        for name, labels in (("truth", view.truth), ("prediction", view.prediction)):
            axis = next(axes)
            _draw(axis, view, labels, palette, hu_range)
            axis.set_title(f"{view.plane}, {name}", color=INK, fontsize=8)
    figure.tight_layout(pad=0.5)
    return figure


def write_preview(
    path: Path, volume: Volume, labels: np.ndarray, *, hu_range: Sequence[float]
) -> None:
    """Draw CT and labels in a coronal and an axial plane and write a PNG.

    Args:
        path: of the picture.
        volume: the CT, int16 HU in RAS orientation.
        labels: uint8 [X, Y, Z] on its grid.
        hu_range: HU between which grey levels are told apart.
    """
    low, high = hu_range
    scaled = np.clip((volume.array.astype(np.float32) - low) / (high - low), 0, 1)
    views = [
        _cut(scaled, labels, labels, volume.spacing, plane, axis)
        for plane, axis in (("coronal", 1), ("axial", 2))
    ]
    ratios = [
        min(max(v.extent[0] / v.extent[1], 0.4), 2.0) for v in views for _ in "ab"
    ]
    figure = Figure(
        figsize=(ROW_INCHES * sum(ratios), ROW_INCHES), facecolor="black", dpi=110
    )
    axes = figure.subplots(1, 4, width_ratios=ratios)
    palette = colors_of(int(labels.max()) + 1)
    for i, view in enumerate(views):
        for axis, shown in zip(
            axes[2 * i :], (np.zeros_like(view.truth), view.truth), strict=False
        ):
            _draw(axis, view, shown, palette, hu_range)
            axis.set_title(view.plane, color=INK, fontsize=9)
    figure.tight_layout(pad=0.6)
    with replacing(path) as partial:
        figure.savefig(partial, format="png", facecolor="black")


def panel(case: Segmented) -> np.ndarray:
    """Return CT, truth and prediction of a coronal plane side by side, uint8 [H, W, 3].

    A voxel is a pixel, in the layout of the overview; the CT fills grey levels from its
    darkest to its brightest voxel.
    """
    view = _view(case, "coronal", 1)
    spread = max(float(np.ptp(view.ct)), 1e-6)
    grey = np.repeat(((view.ct - view.ct.min()) / spread)[..., None], 3, axis=-1)
    top = max(int(view.truth.max()), int(view.prediction.max()))
    palette = colors_of(top + 1)
    parts = [grey]
    for labels in (view.truth, view.prediction):
        alpha = OPACITY * (labels > 0)[..., None]
        parts.append((1 - alpha) * grey + alpha * palette[labels])
    return np.round(255 * np.concatenate(parts, axis=1)).astype(np.uint8)


def colors_of(num_classes: int) -> np.ndarray:
    """Return RGB in [0, 1] for each class, `[K, 3]`; the background is black.

    Hues advance by the golden ratio, so that classes with neighbouring numbers, such as
    two ribs, never look alike; brightness and saturation tell apart hues that return.
    Arteries and the heart are red and veins blue, as in every atlas.
    """
    ids = np.arange(num_classes)
    hue = (0.02 + ids * 0.6180339887) % 1.0
    saturation = np.array([0.85, 0.55, 0.7])[ids % 3]
    value = np.array([1.0, 0.75])[ids // 3 % 2]
    for words, base in ((ARTERIES, 0.0), (VEINS, 0.61)):
        chosen = [k for k in ids if any(w in class_name(k) for w in words)]
        hue[chosen] = (base + 0.03 * np.sin(3 * ids[chosen])) % 1.0
        saturation[chosen] = 0.9
    rgb = colors.hsv_to_rgb(np.stack([hue, saturation, value], axis=-1))
    rgb[0] = 0
    return rgb


def _view(case: Segmented, plane: str, axis: int) -> View:
    return _cut(case.image, case.truth, case.prediction, case.spacing, plane, axis)


def _cut(image, truth, prediction, spacing, plane, axis) -> View:
    index = _richest_plane(truth, axis)

    def rows(volume):  # [X, Y] or [X, Z] -> rows from the top, columns from the right
        return np.ascontiguousarray(volume.take(index, axis=axis)[::-1, ::-1].T)

    across, up = (spacing[i] for i in range(3) if i != axis)
    ct = rows(image)
    extent = (across * ct.shape[1], up * ct.shape[0])
    return View(plane, ct, rows(truth), rows(prediction), extent)


def _richest_plane(truth: np.ndarray, axis: int) -> int:
    """Index of the plane with most classes, then most labelled voxels."""
    planes = np.moveaxis(truth, axis, 0)
    scores = []
    for plane in planes:
        counts = np.bincount(plane.reshape(-1), minlength=1)[1:]
        scores.append(((counts > 0).sum(), counts.sum()))
    return max(range(len(scores)), key=scores.__getitem__)


def _widths(cases) -> list[float]:
    """Widths of the four columns for rows of height 1."""
    widest = [
        max(case.views[i].extent[0] / case.views[i].extent[1] for case in cases)
        for i in range(2)
    ]
    return [min(max(w, 0.4), 2.0) for w in widest for _ in range(2)]


def _draw(axis, view: View, labels: np.ndarray, palette: np.ndarray, hu_range) -> None:
    low, high = hu_range
    hu = low + view.ct * (high - low)
    grey = np.clip((hu - HU_WINDOW[0]) / (HU_WINDOW[1] - HU_WINDOW[0]), 0, 1)
    grey = np.repeat(grey[..., None], 3, axis=-1)
    alpha = OPACITY * (labels > 0)[..., None]
    axis.imshow(
        (1 - alpha) * grey + alpha * palette[labels],
        extent=(0, view.extent[0], 0, view.extent[1]),
        interpolation="nearest",
    )
    axis.set(xticks=[], yticks=[])
    for spine in axis.spines.values():
        spine.set_visible(False)
    style = dict(color=INK, fontsize=9, transform=axis.transAxes, va="center")
    left, right = "AP" if view.plane == "sagittal" else "RL"
    axis.text(0.01, 0.5, left, ha="left", **style)
    axis.text(0.99, 0.5, right, ha="right", **style)
