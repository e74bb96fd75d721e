"""Normalised surface Dice of every class, by DeepMind's surface-distance."""

import os
import warnings
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import surface_distance
from scipy import ndimage

from swinsmt_jax import checks

TOLERANCE = 3.0  # mm, as in TotalSegmentator's evaluation
ROUNDING = 1e-6  # of the tolerance: headers hold spacings in float32


def surface_dice(
    prediction: np.ndarray,
    truth: np.ndarray,
    *,
    spacing: Sequence[float],
    num_classes: int,
    tolerance: float = TOLERANCE,
    workers: int | None = None,
) -> np.ndarray:
    """Share of both surfaces that lies within `tolerance` of the other, by class.

    Nikolov et al. 2018, arXiv:1809.04430. As for Dice, the result is NaN for a class
    that is absent from the truth and 0 for one that is present but not predicted.

    Args:
        prediction: class ids `[X, Y, Z]`.
        truth: class ids of the same shape.
        spacing: sides of a voxel in mm.
        num_classes: classes K, the background among them.
        tolerance: mm.
        workers: classes measured at once; by default as many as there are CPU cores.

    Returns:
        float64 `[K]`; NaN for the background.

    Raises:
        UserError: for other shapes, or a spacing or tolerance that is not positive.
    """
    checks.require(
        prediction.ndim == 3 and prediction.shape == truth.shape,
        f"prediction has shape {prediction.shape} and truth {truth.shape}; both must "
        "be label maps of the same voxels along three axes.",
    )
    checks.require(
        tolerance > 0 and len(spacing) == 3 and min(spacing) > 0,
        f"tolerance is {tolerance} mm and spacing {tuple(spacing)} mm; all must be "
        "greater than 0.",
    )
    boxes = [ndimage.find_objects(x, num_classes - 1) for x in (truth, prediction)]

    def measure(k):
        own, other = (found[k - 1] for found in boxes)
        if own is None:
            return np.nan
        if other is None:
            return 0.0
        box = tuple(
            slice(min(a.start, b.start), max(a.stop, b.stop))
            for a, b in zip(own, other, strict=True)
        )
        distances = surface_distance.compute_surface_distances(
            truth[box] == k, prediction[box] == k, spacing
        )
        within = tolerance * (1 + ROUNDING)
        return surface_distance.compute_surface_dice_at_tolerance(distances, within)

    workers = workers or len(os.sched_getaffinity(0))
    with warnings.catch_warnings(), ThreadPoolExecutor(workers) as pool:
        # The library calls scipy.ndimage by the names of its old modules.
        warnings.simplefilter("ignore", DeprecationWarning)
        return np.array([np.nan, *pool.map(measure, range(1, num_classes))])
