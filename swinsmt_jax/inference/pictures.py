"""Planes of a scan with labels drawn over them, and the preview of a prediction.

Pictures follow radiological convention: the patient's right is on the left, and the
head or the front of the body is on top. Voxels keep their proportions in millimetres.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib import colors
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from swinsmt_jax.data import label_table
from swinsmt_jax.data.volume import Volume
from swinsmt_jax.labels import CLASS_NAMES, class_name
from swinsmt_jax.runtime.files import replacing

HU_WINDOW = (-160.0, 240.0)  # soft tissue
OPACITY = 0.55
ARTERIES = ("aorta", "artery", "trunk", "heart", "atrial")
VEINS = ("vein", "vena")
INK = "#d8d8d8"
ROW_INCHES = 4.2
PLANES = {"coronal": 1, "axial": 2, "sagittal": 0}  # and the axis across them


@dataclass(frozen=True)
class View:
    """One plane of a case as arrays of image rows, top row first.

    Attributes:
        plane: of `PLANES`.
        ct: HU.
        truth, prediction: class ids.
        extent: width and height in mm.
    """

    plane: str
    ct: np.ndarray
    truth: np.ndarray
    prediction: np.ndarray
    extent: tuple[float, float]

    @property
    def ratio(self) -> float:
        """Width for a height of 1, within limits."""
        return min(max(self.extent[0] / self.extent[1], 0.4), 2.0)


def cut(
    plane: str,
    image: np.ndarray,
    truth: np.ndarray,
    prediction: np.ndarray,
    spacing: Sequence[float],
) -> View:
    """Cut the plane where the truth has the most classes; volumes are [X, Y, Z]."""
    axis = PLANES[plane]
    index = _richest_plane(truth, axis)

    def rows(volume):  # [X, Y] or [X, Z] -> rows from the top, columns from the right
        return np.ascontiguousarray(volume.take(index, axis=axis)[::-1, ::-1].T)

    across, up = (spacing[i] for i in range(3) if i != axis)
    ct = rows(image)
    extent = (across * ct.shape[1], up * ct.shape[0])
    return View(plane, ct, rows(truth), rows(prediction), extent)


def _richest_plane(truth: np.ndarray, axis: int) -> int:
    """Index of the plane with the most classes, then the most labelled voxels."""
    scores = []
    for plane in np.moveaxis(truth, axis, 0):
        counts = np.bincount(plane.reshape(-1), minlength=1)[1:]
        scores.append(((counts > 0).sum(), counts.sum()))
    return max(range(len(scores)), key=scores.__getitem__)


def over(grey: np.ndarray, labels: np.ndarray, names: Sequence[str]) -> np.ndarray:
    """Lay the colours of labels over grey levels in [0, 1]: RGB `[H, W, 3]`.

    `names` are those of the label ids, the background first.
    """
    alpha = OPACITY * (labels > 0)[..., None]
    palette = colours_of(int(labels.max()) + 1, names)
    return (1 - alpha) * grey[..., None] + alpha * palette[labels]


def draw(
    axis: Axes, view: View, labels: np.ndarray, *, title: str, names: Sequence[str]
) -> None:
    """Draw the CT of a view with labels over it on an axis."""
    low, high = HU_WINDOW
    grey = np.clip((view.ct.astype(np.float32) - low) / (high - low), 0, 1)
    axis.set_title(title, color=INK, fontsize=9)
    axis.imshow(
        over(grey, labels, names),
        extent=(0, view.extent[0], 0, view.extent[1]),
        interpolation="nearest",
    )
    axis.set(xticks=[], yticks=[])
    for spine in axis.spines.values():
        spine.set_visible(False)
    style: dict = dict(color=INK, fontsize=9, transform=axis.transAxes, va="center")
    left, right = "AP" if view.plane == "sagittal" else "RL"
    axis.text(0.01, 0.5, left, ha="left", **style)
    axis.text(0.99, 0.5, right, ha="right", **style)


def save(figure: Figure, path: Path) -> None:
    """Write a figure as PNG; the file appears when complete."""
    with replacing(path) as partial:
        figure.savefig(partial, format="png", facecolor="black")


def write_preview(
    path: Path, volume: Volume, labels: np.ndarray, names: Sequence[str] = CLASS_NAMES
) -> None:
    """Draw CT and labels in a coronal and an axial plane and write a PNG.

    Args:
        path: of the picture.
        volume: the CT, int16 HU in RAS orientation.
        labels: uint8 [X, Y, Z] on its grid.
        names: of the label ids, the background first.
    """
    views = [
        cut(plane, volume.array, labels, labels, volume.spacing)
        for plane in ("coronal", "axial")
    ]
    ratios = [view.ratio for view in views for _ in "ab"]
    size = ROW_INCHES * sum(ratios), ROW_INCHES
    figure = Figure(figsize=size, facecolor="black", dpi=110)
    axes = iter(figure.subplots(1, 4, width_ratios=ratios))
    for view in views:
        for shown in (np.zeros_like(view.truth), view.truth):
            draw(next(axes), view, shown, title=view.plane, names=names)
    figure.tight_layout(pad=0.6)
    save(figure, path)


def colours_of(num_classes: int, names: Sequence[str] = CLASS_NAMES) -> np.ndarray:
    """Return RGB in [0, 1] for each class, `[K, 3]`; the background is black.

    Colours come from `label_table.colour`. But arteries and the heart are red and veins
    blue, as in every atlas; the `names` of the label ids identify them.
    """
    ids = range(num_classes)
    hsv = colors.rgb_to_hsv([label_table.colour(k) for k in ids])
    for words, hue in ((ARTERIES, 0.0), (VEINS, 0.61)):
        chosen = [k for k in ids if any(w in class_name(k, names) for w in words)]
        hsv[chosen, 0] = (hue + 0.03 * np.sin(3 * np.array(chosen))) % 1.0
        hsv[chosen, 1] = 0.9
    rgb = colors.hsv_to_rgb(hsv)
    rgb[0] = 0
    return rgb
