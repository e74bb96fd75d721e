"""What was measured in a case, and the scores of many cases as an array."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from swinsmt_jax.evaluation.metrics import (
    METRICS,
    Counts,
    Metric,
    Pair,
    false_positive_classes,
    overlap_counts,
)


@dataclass(frozen=True)
class CaseResult:
    """What was found in one case.

    Attributes:
        name: the case's id.
        counts: voxels of each class in prediction, truth and both.
        seconds: time of the prediction, without reading the case; NaN if unknown.
        scores: of each class `[K]`, by the name of a metric.
    """

    name: str
    counts: Counts
    seconds: float
    scores: dict[str, np.ndarray]


def score(
    name: str,
    prediction: np.ndarray,
    truth: np.ndarray,
    *,
    seconds: float,
    spacing: Sequence[float],
    num_classes: int,
    metrics: Sequence[Metric],
    workers: int | None = None,
) -> CaseResult:
    """Compare two label maps `[X, Y, Z]` of a case.

    Arguments as in `Pair` and `CaseResult`; `metrics` as from `chosen_metrics`.
    """
    counts = overlap_counts(prediction, truth, num_classes=num_classes)
    pair = Pair(prediction, truth, counts, spacing, workers)
    return CaseResult(name, counts, seconds, {m.name: m.compute(pair) for m in metrics})


def measured(results: Sequence[CaseResult]) -> list[Metric]:
    """Return the metrics that every case has."""
    return [m for m in METRICS.values() if all(m.name in r.scores for r in results)]


def scores_of(results: Sequence[CaseResult], metric: Metric) -> np.ndarray:
    """Return the scores of each case and class, `[cases, K]`; NaN where unmeasured."""
    unknown = np.full(len(results[0].counts.truth), np.nan)
    return np.stack([result.scores.get(metric.name, unknown) for result in results])


def false_positives(results: Sequence[CaseResult]) -> np.ndarray:
    """Classes predicted in a case whose truth lacks them, bool `[cases, K]`."""
    return np.stack([false_positive_classes(r.counts) for r in results])
