"""The list of metrics, and the counts of voxels behind Dice.

A class that the truth of a case lacks has no score there, whatever was predicted; one
that is present but not predicted scores 0. That is the rule of TotalSegmentator's
resources/evaluate.py, for Dice and surface Dice alike. What is predicted though absent
is counted apart.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from swinsmt_jax import checks
from swinsmt_jax.evaluation.surface import SurfaceRule, surface_dice

CHUNK = 1 << 22  # voxels counted at once, which bounds the memory of the joint index


class Counts(NamedTuple):
    """Voxels of each class, int64 `[K]`: in both, in the prediction, in the truth."""

    intersection: np.ndarray
    predicted: np.ndarray
    truth: np.ndarray


@dataclass(frozen=True)
class Pair:
    """A prediction and the truth of a case, as metrics see them.

    Attributes:
        prediction, truth: class ids `[X, Y, Z]`.
        counts: of their voxels, for K classes.
        spacing: sides of a voxel in mm.
        workers: threads that a metric may use; None for as many as there are CPU cores.
    """

    prediction: np.ndarray
    truth: np.ndarray
    counts: Counts
    spacing: Sequence[float]
    workers: int | None = None


@dataclass(frozen=True)
class Metric:
    """A score of each class of a case, which all tables and files then show.

    Attributes:
        name: its key in results.json and its column in CSV files.
        title: its name in tables.
        unit: such as "mm"; for "%", tables show the score times 100.
        format: of the number in tables, as ".2f".
        compute: from a `Pair` to scores `[K]`, NaN for a class without one; a function
            of a module, so that other processes can import it.
        surfaces: whether it compares surfaces, which users may leave out; `compute`
            then gets a `SurfaceRule` after the pair.
    """

    name: str
    title: str
    unit: str
    format: str
    compute: Callable[..., np.ndarray]
    surfaces: bool = False

    @property
    def heading(self) -> str:
        """Title and unit; per cent are not told, as all of Dice's kind are in them."""
        return self.title if self.unit == "%" else f"{self.title} ({self.unit})"

    def text(self, score: float) -> str:
        """Format a score without its unit, "-" for NaN."""
        scale = 100 if self.unit == "%" else 1
        return "-" if np.isnan(score) else format(scale * score, self.format)


METRICS: dict[str, Metric] = {}  # in the order of rows and columns


def register(metric: Metric) -> Metric:
    """Add a metric to all that is measured; a `UserError` for a name taken."""
    checks.require(
        metric.name not in METRICS,
        f"a metric named {metric.name!r} is registered already; choose another name.",
    )
    METRICS[metric.name] = metric
    return metric


def chosen_metrics(
    names: Sequence[str] | None = None, *, surface_rule: SurfaceRule | None
) -> tuple[Metric, ...]:
    """Return the metrics of these names, by default all; all compute from a `Pair`.

    Those of surfaces follow the rule, or are left out if it is None.

    Raises:
        UserError: for a name unknown, and without Dice, by which cases are ranked.
    """
    names = list(METRICS if names is None else names)
    for name in names:
        checks.one_of("metrics", name, METRICS)
    checks.require("dice" in names, f"metrics is {names}, but must have 'dice'.")

    def ruled(metric):
        compute = functools.partial(metric.compute, rule=surface_rule)
        return dataclasses.replace(metric, compute=compute)

    found = [metric for name, metric in METRICS.items() if name in names]
    if surface_rule is None:
        return tuple(metric for metric in found if not metric.surfaces)
    return tuple(ruled(metric) if metric.surfaces else metric for metric in found)


def overlap_counts(
    prediction: np.ndarray, truth: np.ndarray, *, num_classes: int
) -> Counts:
    """Count the voxels of every class in two label maps of one shape, in one pass.

    Raises:
        UserError: for different shapes, other dtypes than integers, or ids that are not
            in [0, num_classes).
    """
    checks.require(
        prediction.shape == truth.shape,
        f"prediction has shape {prediction.shape}, but truth has {truth.shape}; both "
        "must be label maps of the same voxels.",
    )
    _check_labels("prediction", prediction, num_classes)
    _check_labels("truth", truth, num_classes)
    joint = np.zeros(num_classes**2, np.int64)
    prediction, truth = prediction.reshape(-1), truth.reshape(-1)
    for start in range(0, truth.size, CHUNK):
        part = slice(start, start + CHUNK)
        index = truth[part].astype(np.int64) * num_classes + prediction[part]
        joint += np.bincount(index, minlength=joint.size)
    table = joint.reshape(num_classes, num_classes)  # [truth, prediction]
    return Counts(table.diagonal().copy(), table.sum(axis=0), table.sum(axis=1))


def dice(counts: Counts) -> np.ndarray:
    """Dice coefficient by class, float64 `[K]`."""
    total = counts.predicted + counts.truth
    score = 2 * counts.intersection / np.maximum(total, 1)
    return np.where(counts.truth > 0, score, np.nan)


def false_positive_classes(counts: Counts) -> np.ndarray:
    """Structures predicted though absent from the truth, bool `[K]`.

    Their Dice is NaN, so no mean shows them. The background is never among them.
    """
    wrong = (counts.truth == 0) & (counts.predicted > 0)
    wrong[0] = False
    return wrong


def _check_labels(name: str, labels: np.ndarray, num_classes: int) -> None:
    checks.require(
        np.issubdtype(labels.dtype, np.integer) and labels.size > 0,
        f"{name} has dtype {labels.dtype} and shape {labels.shape}, but must be a "
        "label map: integer class ids of at least one voxel.",
    )
    low, high = int(labels.min()), int(labels.max())
    checks.require(
        low >= 0 and high < num_classes,
        f"{name} holds the labels {low} to {high}, but class ids of {num_classes} "
        f"classes lie in [0, {num_classes - 1}]; check that data and model use the "
        "same class map.",
    )


def _dice(pair):
    return dice(pair.counts)


def _surface_dice(pair, rule):
    return surface_dice(
        pair.prediction,
        pair.truth,
        spacing=rule.spacing or pair.spacing,
        num_classes=len(pair.counts.truth),
        tolerance=rule.tolerance,
        workers=pair.workers,
    )


DICE = register(Metric("dice", "Dice", "%", ".2f", _dice))
register(
    Metric("surface_dice", "surface Dice", "%", ".2f", _surface_dice, surfaces=True)
)
