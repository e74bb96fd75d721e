"""Dice of a segmentation by class, and its means over classes and cases. numpy only."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from swinsmt_jax import checks

AVERAGES = ("over_classes", "over_cases", "over_pairs")
CHUNK = 1 << 22  # voxels counted at once, which bounds the memory of the joint index


class Counts(NamedTuple):
    """Voxels of each class, int64 `[K]`: in both, in the prediction, in the truth."""

    intersection: np.ndarray
    predicted: np.ndarray
    truth: np.ndarray


def overlap_counts(
    prediction: np.ndarray, truth: np.ndarray, *, num_classes: int
) -> Counts:
    """Count the voxels of every class in both label maps, in one pass.

    Args:
        prediction: class ids, integers in [0, num_classes), any shape.
        truth: class ids of the same shape.
        num_classes: classes K, the background among them.

    Raises:
        UserError: for different shapes, other dtypes, or ids out of range.
    """
    prediction, truth = np.asarray(prediction), np.asarray(truth)
    checks.require(
        prediction.shape == truth.shape,
        f"prediction has shape {prediction.shape}, but truth has {truth.shape}; both "
        "must be label maps of the same voxels.",
    )
    for name, labels in (("prediction", prediction), ("truth", truth)):
        _check_labels(name, labels, num_classes)
    joint = np.zeros(num_classes**2, np.int64)
    prediction, truth = prediction.reshape(-1), truth.reshape(-1)
    for start in range(0, truth.size, CHUNK):
        part = slice(start, start + CHUNK)
        index = truth[part].astype(np.int64) * num_classes + prediction[part]
        joint += np.bincount(index, minlength=joint.size)
    joint = joint.reshape(num_classes, num_classes)  # [truth, prediction]
    return Counts(joint.diagonal().copy(), joint.sum(axis=0), joint.sum(axis=1))


def dice(counts: Counts) -> np.ndarray:
    """Dice coefficient by class, float64 `[K]`.

    TotalSegmentator's rule: NaN for a class absent from the truth, whatever was
    predicted; 0 for one that is present but not predicted.
    """
    total = counts.predicted + counts.truth
    score = 2 * counts.intersection / np.maximum(total, 1)
    return np.where(counts.truth > 0, score, np.nan)


def false_positive_classes(counts: Counts) -> np.ndarray:
    """Structures predicted though absent from the truth, bool `[K]`.

    Their Dice is NaN, so no mean shows them; they are counted and reported apart. The
    background, class 0, is never among them.
    """
    wrong = (counts.truth == 0) & (counts.predicted > 0)
    wrong[0] = False
    return wrong


def averages(
    scores: np.ndarray, *, classes: Sequence[int] | None = None
) -> dict[str, float]:
    """Mean of `scores [cases, K]` under three rules; NaN entries are left out.

    - "over_classes" (the default of all tables): over the cases of each class, then
      over the classes that have a value;
    - "over_cases": over the classes present in each case, then over the cases that
      have a value;
    - "over_pairs": over all (case, class) pairs that have a value.

    The Swin SMT paper does not say how it averages: its overall Dice, 85.09, is neither
    the plain mean of its five groups (83.91) nor their mean weighted by the number of
    classes (84.23). So tables show all three, labelled.

    Args:
        scores: Dice or another score by case and class id; column 0 is the background.
        classes: ids to average; by default all but the background.
    """
    scores = np.asarray(scores, np.float64)
    checks.require(
        scores.ndim == 2,
        f"scores have shape {scores.shape}, but must be [cases, classes].",
    )
    ids = list(range(1, scores.shape[1]) if classes is None else classes)
    for number in ids:
        checks.in_range("a class id to average", number, 0, scores.shape[1] - 1)
    chosen = scores[:, ids]
    return {
        "over_classes": float(_mean(_mean(chosen, axis=0))),
        "over_cases": float(_mean(_mean(chosen, axis=1))),
        "over_pairs": float(_mean(chosen.reshape(-1))),
    }


def group_averages(
    scores: np.ndarray, *, groups: Mapping[str, Sequence[int]]
) -> dict[str, dict[str, float]]:
    """Averages of `scores [cases, K]` in each group of class ids, then "overall".

    "overall" takes every class but the background, whether in a group or not.
    """
    by_group = {n: averages(scores, classes=ids) for n, ids in groups.items()}
    return {**by_group, "overall": averages(scores)}


def bootstrap_intervals(
    scores: np.ndarray,
    *,
    groups: Mapping[str, Sequence[int]],
    rule: str,
    samples: int = 2000,
) -> dict[str, tuple[float, float]]:
    """95 % percentile intervals of `group_averages` over redrawn cases.

    Args:
        scores: `[cases, K]` as in `averages`.
        groups: class ids by group; "overall" is added.
        rule: one of `AVERAGES`.
        samples: how often the cases are redrawn, always with the same seed.

    Returns:
        low and high by group; NaN for fewer than two cases, or no value.
    """
    checks.one_of("rule", rule, AVERAGES)
    scores = np.asarray(scores, np.float64)
    cases, num_classes = scores.shape
    weights = np.random.default_rng(0).multinomial(
        cases, np.full(cases, 1 / cases), size=samples
    )

    def means(values):  # of [cases, n] over redrawn cases: [samples, n]
        present = ~np.isnan(values)
        count = weights @ present
        total = weights @ np.where(present, values, 0.0)
        return np.where(count > 0, total / np.maximum(count, 1), np.nan)

    found = {}
    for name, ids in {**groups, "overall": range(1, num_classes)}.items():
        chosen = scores[:, list(ids)]
        if rule == "over_classes":
            drawn = _mean(means(chosen), axis=1)
        elif rule == "over_cases":
            drawn = means(_mean(chosen, axis=1)[:, None])[:, 0]
        else:
            present = ~np.isnan(chosen)
            count = (weights @ present).sum(axis=1)
            total = (weights @ np.where(present, chosen, 0.0)).sum(axis=1)
            drawn = np.where(count > 0, total / np.maximum(count, 1), np.nan)
        drawn = drawn[~np.isnan(drawn)]
        known = cases > 1 and drawn.size > 0
        low, high = np.quantile(drawn, (0.025, 0.975)) if known else (np.nan,) * 2
        found[name] = float(low), float(high)
    return found


def class_means(scores: np.ndarray) -> np.ndarray:
    """Mean over cases of each class, `[K]`; NaN for a class that no case has."""
    return _mean(np.asarray(scores, np.float64), axis=0)


def _mean(values: np.ndarray, axis: int = 0) -> np.ndarray:
    """Mean of the values that are not NaN; NaN, without a warning, if there is none."""
    present = ~np.isnan(values)
    count = present.sum(axis=axis)
    total = np.where(present, values, 0.0).sum(axis=axis)
    return np.where(count > 0, total / np.maximum(count, 1), np.nan)


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
