"""Whose numbers these are: how this and other tools define one and the same metric.

A convention changes what metrics compute, what counts as surface, and the average. Each
reproduces the functions of one release, which tests marked "reference" run beside it.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial

import numpy as np

from swinsmt_jax import checks
from swinsmt_jax.evaluation.overlap import Counts, Pair
from swinsmt_jax.evaluation.surface import Distances, SurfaceRule, share_within

PERCENT = 95
AREA = "by area of surface elements at the corners of voxels"
COUNT = "over voxels with a face outside"


@dataclass(frozen=True)
class Convention:
    """The metrics of a tool.

    Attributes:
        title: with the version that is followed.
        measures: {metric: (function, definition)}; the function is as that of a
            `metrics.Metric`, and stands for it.
        average: of `averages.AVERAGES`; empty if the tool has none.
        tolerance: of the tool, in mm; 0 if its users choose, None for the smallest side
            of a voxel.
        surfaces: fields of `SurfaceRule` that are other than its defaults.
    """

    title: str
    measures: Mapping[str, tuple[Callable, str]]
    average: str = ""
    tolerance: float | None = 0.0
    surfaces: Mapping = field(default_factory=dict)


def dice(
    counts: Counts,
    *,
    empty: float = np.nan,
    invented: float = np.nan,
    epsilon: float = 0.0,
) -> np.ndarray:
    """Dice coefficient by class, float64 `[K]`.

    Args:
        counts: of the voxels.
        empty: of a class that both lack.
        invented: of a class that the truth lacks, but not the prediction.
        epsilon: added to the sum of both.
    """
    total = counts.predicted + counts.truth
    score = 2 * counts.intersection / np.maximum(total + epsilon, 1)
    absent = np.where(counts.predicted > 0, invented, empty)
    return np.where(counts.truth > 0, score, absent)


def _dice(pair, **options):
    return dice(pair.counts, **options)


def volume_difference(pair: Pair, *, empty: float = np.nan) -> np.ndarray:
    """Return (prediction - truth) / truth by class; `empty` if both lack it."""
    truth, predicted = pair.counts.truth, pair.counts.predicted
    absent = np.where(predicted > 0, np.nan, empty)
    return np.where(truth > 0, (predicted - truth) / np.maximum(truth, 1), absent)


def volume_difference_ml(pair: Pair) -> np.ndarray:
    """Return prediction - truth in ml by class."""
    more = (pair.counts.predicted - pair.counts.truth) * np.prod(pair.spacing) / 1000
    return np.where(pair.counts.truth > 0, more, np.nan)


def hausdorff_by_area(distances: Distances, rule: SurfaceRule) -> float:
    """Return the larger of both surfaces' 95th percentiles by area, in mm."""
    if not distances.both:
        return np.nan
    return max(
        _percentile_by_area(distances.truth, distances.truth_area),
        _percentile_by_area(distances.prediction, distances.prediction_area),
    )


def assd_by_area(distances: Distances, rule: SurfaceRule) -> float:
    """Return the mean distance over the area of both surfaces, in mm."""
    if not distances.both:
        return np.nan
    total = (distances.truth * distances.truth_area).sum()
    total += (distances.prediction * distances.prediction_area).sum()
    return total / (distances.truth_area.sum() + distances.prediction_area.sum())


def _percentile_by_area(mm, area):
    order = np.lexsort((area, mm))
    share = np.cumsum(area[order]) / area.sum()
    at = np.searchsorted(share, PERCENT / 100)
    return mm[order[min(at, len(order) - 1)]]


# DeepMind's surface-distance, which gives inf where numpy has the name np.Inf.


def _deepmind_dice(distances, rule):
    if distances.truth.size or not distances.prediction.size:
        return share_within(distances, rule)
    return 0.0


def _deepmind_hausdorff(distances, rule):
    return hausdorff_by_area(distances, rule) if distances.both else np.inf


def _deepmind_assd(distances, rule):
    if not distances.both:
        return np.nan
    return np.mean(
        [
            np.average(distances.truth, weights=distances.truth_area),
            np.average(distances.prediction, weights=distances.prediction_area),
        ]
    )


# MONAI, whose distances and means are float32.


def _float32(distances):
    return [x.astype(np.float32) for x in distances[:2]]


def _monai_dice(distances, rule):
    mm = np.concatenate(_float32(distances))
    return (mm <= distances.within(rule)).mean() if mm.size else np.nan


def _monai_hausdorff(distances, rule):
    if not distances.both:
        return np.nan
    return max(map(_torch_quantile, _float32(distances)))


def _torch_quantile(mm):
    """Return the percentile as torch.quantile, with 0.95 in float32."""
    rank = float(np.float32(PERCENT / 100)) * (mm.size - 1)
    low, high = int(rank), min(int(rank) + 1, mm.size - 1)
    mm = np.partition(mm, [low, high]).astype(np.float64)
    return np.float32(mm[low] + (mm[high] - mm[low]) * (rank - low))


def _monai_assd(distances, rule):
    mm = np.concatenate(_float32(distances))
    return np.float32(mm.mean(dtype=np.float64)) if mm.size else np.nan


# MedPy, and panoptica, which began as its copy.


def _percentile_of_both(distances, rule):
    mm = np.concatenate(distances[:2])
    return np.percentile(mm, PERCENT) if mm.size else np.nan


def _medpy_hausdorff(distances, rule):
    return _percentile_of_both(distances, rule) if distances.both else np.nan


def _medpy_assd(distances, rule):
    return np.concatenate(distances[:2]).mean() if distances.both else np.nan


def _panoptica_assd(distances, rule):
    if not distances.both:
        return np.nan
    return (distances.truth.mean() + distances.prediction.mean()) / 2


def _panoptica_dice(distances, rule):
    if not distances.both:
        return np.nan
    return np.mean([(mm <= distances.within(rule)).mean() for mm in distances[:2]])


OWN = Convention(
    "swinsmt_jax",
    {
        "dice": (_dice, "2 |A and B| / (|A| + |B|); missed 0"),
        "surface_dice": (
            share_within,
            f"share of both surfaces within the tolerance, {AREA}; missed 0",
        ),
        "hd95": (
            hausdorff_by_area,
            f"the larger of both surfaces' 95th percentiles, {AREA}; over structures "
            "that were found",
        ),
        "assd": (
            assd_by_area,
            f"mean distance over both surfaces, {AREA}; over structures that were "
            "found",
        ),
        "volume": (volume_difference, "(predicted - true) / true volume"),
        "volume_ml": (volume_difference_ml, "predicted - true volume"),
    },
)

CONVENTIONS = {
    "monai": Convention(
        "MONAI 1.6.1",
        {
            "dice": (_dice, "no score without truth (ignore_empty)"),
            "surface_dice": (_monai_dice, f"{COUNT}; missed or invented 0"),
            "hd95": (
                _monai_hausdorff,
                f"the larger of both 95th percentiles, interpolated, {COUNT}; none if "
                "missed or invented",
            ),
            "assd": (
                _monai_assd,
                f"mean of both lists of distances together, {COUNT}; inf if missed or "
                "invented",
            ),
        },
        average="over_cases",
        surfaces={"elements": "voxels"},
    ),
    "nnunet": Convention(
        "nnU-Net 2.8.1",
        {"dice": (partial(_dice, invented=0.0), "invented 0; both empty: none")},
        average="over_all_classes",
    ),
    "totalseg": Convention(
        "TotalSegmentator's resources/evaluate.py",
        {
            "dice": (partial(_dice, epsilon=1e-6), "1e-6 is added to |A| + |B|"),
            "surface_dice": (share_within, f"{AREA}; missed 0"),
        },
        average="over_classes",
        tolerance=3.0,
        surfaces={"spacing": (1.5, 1.5, 1.5)},
    ),
    "surface-distance": Convention(
        "surface-distance 0.1",
        {
            "dice": (
                partial(_dice, invented=0.0),
                "invented 0; both empty: none",
            ),
            "surface_dice": (_deepmind_dice, f"{AREA}; missed or invented 0"),
            "hd95": (
                _deepmind_hausdorff,
                f"the larger of both surfaces' 95th percentiles, {AREA}; inf if one or "
                "both are empty",
            ),
            "assd": (
                _deepmind_assd,
                f"the mean of its two averages, {AREA}; none if missed",
            ),
        },
    ),
    "medpy": Convention(
        "MedPy 0.5.2",
        {
            "dice": (partial(_dice, empty=1.0, invented=0.0), "1 if both are empty"),
            "hd95": (
                _medpy_hausdorff,
                f"95th percentile of both lists together, interpolated, {COUNT}; "
                "refused if one is empty",
            ),
            "assd": (
                _medpy_assd,
                f"mean of both lists together, {COUNT}; refused if one is empty",
            ),
            "volume": (volume_difference, "(predicted - true) / true volume (ravd)"),
        },
        surfaces={"elements": "voxels"},
    ),
    "panoptica": Convention(
        "panoptica 2.1.7",
        {
            "dice": (partial(_dice, empty=0.0, invented=0.0), "0 if both are empty"),
            "surface_dice": (
                _panoptica_dice,
                f"mean of both shares within the tolerance, {COUNT}; none if missed",
            ),
            "hd95": (
                _percentile_of_both,
                f"95th percentile of both lists together, interpolated, {COUNT}; of a "
                "missed structure, distances to a place outside of the scan",
            ),
            "assd": (_panoptica_assd, f"mean of both means, {COUNT}; none if missed"),
            "volume": (
                partial(volume_difference, empty=0.0),
                "(predicted - true) / true volume (RVD)",
            ),
        },
        tolerance=None,
        surfaces={"elements": "voxels", "nowhere": (-1, 0, 0)},
    ),
}


def convention(name: str | None) -> Convention:
    """Return a tool's convention, or without a name the one of this package.

    Raises:
        UserError: for an unknown name.
    """
    if not name:
        return OWN
    checks.one_of("--protocol", name, CONVENTIONS)
    return CONVENTIONS[name]


def surface_rule(
    name: str | None, *, tolerance: float | None, cut_faces: bool = True
) -> SurfaceRule:
    """Return what counts as surface in a convention.

    Args:
        name: of the convention, or None.
        tolerance: in mm; None for the convention's.
        cut_faces: as in `SurfaceRule`; tools count them.
    """
    own = convention(name)
    if tolerance is None:
        tolerance = own.tolerance if own.tolerance != 0 else SurfaceRule.tolerance
    changes = {"slack": 0.0, **own.surfaces} if name else {}
    return SurfaceRule(tolerance, cut_faces=cut_faces, **changes)
