"""What was measured in a case, and the evaluation of many cases."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from swinsmt_jax import labels
from swinsmt_jax.data.sample import Sample
from swinsmt_jax.data.volume import spacing_of
from swinsmt_jax.evaluation.averages import averages, group_averages
from swinsmt_jax.evaluation.metrics import METRICS, Metric, measured
from swinsmt_jax.evaluation.overlap import (
    Counts,
    Pair,
    false_positive_classes,
    missed_classes,
    overlap_counts,
)
from swinsmt_jax.evaluation.surface import SurfaceRule


@dataclass(frozen=True)
class CaseResult:
    """What was found in one case.

    Attributes:
        name: the case's id.
        counts: voxels of each class in prediction, truth and both.
        seconds: time of the prediction, without reading the case; NaN if unknown.
        scores: of each class `[K]`, by the name of a metric.
        note: how the prediction's grid lay beside the scan's, if it was resampled.
        grid: shape, and sides of a voxel in mm, on which it was scored.
        truth: of each class `[K]`, the sum of the places of its voxels, counted along
            the grid: what distinguishes one truth from another.
        notes: what a user should know about the scan's file.
        warnings: `anatomy.QualityWarning`s of the prediction as dicts, if requested.
    """

    name: str
    counts: Counts
    seconds: float
    scores: dict[str, np.ndarray]
    note: str = ""
    grid: Sequence[float] = ()
    truth: np.ndarray | None = None
    notes: Sequence[str] = ()
    warnings: Sequence[dict[str, str]] = ()

    def of(self, metric: Metric) -> np.ndarray:
        """Return the scores of a metric `[K]`, NaN if it was not measured."""
        unknown = np.full(len(self.counts.truth), np.nan)
        return self.scores.get(metric.name, unknown)

    def mean(self, metric: Metric) -> float:
        """Return the mean of a metric over the classes that have a score."""
        return averages(self.of(metric)[None])["over_classes"]


@dataclass(frozen=True)
class Segmented:
    """A scan with its labels, a prediction of them `[X, Y, Z]`, and what is right."""

    scan: Sample
    prediction: np.ndarray
    result: CaseResult


@dataclass(frozen=True)
class Evaluation:
    """The results of cases, and how their scores are averaged and named.

    Attributes:
        results: of the cases.
        groups: class ids of each group, the columns of the table.
        rule: of `AVERAGES`, the one that counts as the result.
        names: of the label ids.
    """

    results: Sequence[CaseResult]
    groups: Mapping[str, Sequence[int]]
    rule: str = "over_classes"
    names: Sequence[str] = labels.CLASS_NAMES

    def scores(self, metric: Metric) -> np.ndarray:
        """Return the scores of each case and class, `[cases, K]`."""
        return np.stack([result.of(metric) for result in self.results])

    def means(self, metric: Metric) -> dict[str, float]:
        """Return the mean of a metric in each group and "overall", by the rule."""
        found = group_averages(self.scores(metric), groups=self.groups)
        return {group: mean[self.rule] for group, mean in found.items()}

    def measured(self) -> list[Metric]:
        """Return the metrics that every case has."""
        known = set.intersection(*(set(result.scores) for result in self.results))
        return [metric for metric in METRICS.values() if metric.name in known]

    def false_positives(self) -> np.ndarray:
        """Classes predicted in a case whose truth lacks them, bool `[cases, K]`."""
        return np.stack([false_positive_classes(r.counts) for r in self.results])

    def missed(self) -> np.ndarray:
        """Classes of the truth without a predicted voxel, bool `[cases, K]`."""
        return np.stack([missed_classes(r.counts) for r in self.results])


def score(
    scan: Sample,
    prediction: np.ndarray,
    *,
    seconds: float,
    num_classes: int,
    metrics: Sequence[Metric],
    surface_rule: SurfaceRule | None = None,
    workers: int | None = None,
    confidence: tuple[np.ndarray | None, np.ndarray | None] = (None, None),
) -> Segmented:
    """Compare a prediction `[X, Y, Z]` with a scan's labels.

    Classes and voxels that are not annotated have no score: both are background there.
    Arguments as in `Pair` and `CaseResult`; `metrics` as from `chosen_metrics`, with
    the same `surface_rule`.
    """
    scan, prediction, known = _annotated(scan, prediction, num_classes)
    counts = overlap_counts(prediction, scan.label, num_classes=num_classes)
    spacing = spacing_of(scan.affine)
    pair = Pair(prediction, scan.label, counts, spacing, workers, *confidence)
    scores = measured(pair, metrics, surface_rule=surface_rule)
    notes = list(scan.notes)
    if not known.all():
        scores = {name: np.where(known, own, np.nan) for name, own in scores.items()}
        notes.append(f"it annotates {known.sum() - 1} of {num_classes - 1} classes")
    grid = [*scan.label.shape, *(round(side, 3) for side in spacing)]
    places = np.arange(scan.label.size, dtype=float)
    truth = np.bincount(scan.label.reshape(-1), places, minlength=num_classes)
    result = CaseResult(
        *(scan.name, counts, seconds, scores),
        grid=grid,
        truth=truth,
        notes=notes,
    )
    return Segmented(scan, prediction, result)


def _annotated(scan, prediction, num_classes):
    """Return scan and prediction without what is not annotated, and which classes are.

    Without it they are background; a prediction keeps ids that there are not, for the
    message.
    """
    known, ignored = scan.annotated_mask(num_classes), scan.label == labels.IGNORED
    if known.all() and not ignored.any():
        return scan, prediction, known
    table = np.arange(256, dtype=np.uint8)
    table[:num_classes][~known] = 0
    prediction = np.where(ignored, 0, table[prediction])
    label = np.where(ignored, 0, table[scan.label])
    return replace(scan, label=label), prediction, known
