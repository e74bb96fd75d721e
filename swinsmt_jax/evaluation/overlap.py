"""The voxels of each class in two label maps, alone and in common."""

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from scipy import ndimage

from swinsmt_jax import checks
from swinsmt_jax.results import statistics

CHUNK = 1 << 16  # voxels counted at once, which stay in the processor's cache


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
        probability, close: of each voxel's class, as in `inference.grid.Decided`; None
            if unknown.
    """

    prediction: np.ndarray
    truth: np.ndarray
    counts: Counts
    spacing: Sequence[float]
    workers: int | None = None
    probability: np.ndarray | None = None
    close: np.ndarray | None = None

    @functools.cached_property
    def confidence(self) -> np.ndarray:
        """`statistics.confidence` of each class, `[3, K]`; NaN if not predicted."""
        number = len(self.counts.truth)
        found = np.full((3, number), np.nan)
        if self.probability is None or self.close is None:
            return found
        boxes = ndimage.find_objects(self.prediction, max_label=number - 1)
        for k, box in enumerate(boxes, start=1):
            if box is not None:
                mask = self.prediction[box] == k
                own = self.probability[box][mask], self.close[box][mask]
                found[:, k] = statistics.confidence(*own)
        return found


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


def false_positive_classes(counts: Counts) -> np.ndarray:
    """Structures predicted though absent from the truth, bool `[K]`.

    Their Dice is NaN, so no mean shows them. The background is never among them.
    """
    wrong = (counts.truth == 0) & (counts.predicted > 0)
    wrong[0] = False
    return wrong


def missed_classes(counts: Counts) -> np.ndarray:
    """Structures of the truth without any predicted voxel, bool `[K]`."""
    missed = (counts.truth > 0) & (counts.predicted == 0)
    missed[0] = False
    return missed


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
