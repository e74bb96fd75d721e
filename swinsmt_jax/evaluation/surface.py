"""What compares the surfaces of structures, by DeepMind's surface-distance."""

import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import loky
import numpy as np
import surface_distance
from scipy import ndimage

from swinsmt_jax import checks

TOLERANCE = 3.0  # mm, as in TotalSegmentator's evaluation
ROUNDING = 1e-6  # of the tolerance: headers hold spacings in float32


@dataclass(frozen=True)
class SurfaceRule:
    """How the surfaces of a prediction and the truth are compared.

    Attributes:
        tolerance: mm within which two surfaces count as one.
        spacing: sides of a voxel in mm, if not those of the scan.
    """

    tolerance: float = TOLERANCE
    spacing: tuple[float, float, float] | None = None


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

    Nikolov et al. 2018, arXiv:1809.04430. Arguments and result as in `by_class`; 0 for
    a class that was missed.

    Raises:
        UserError: for other shapes, or a spacing or tolerance that is not positive.
    """
    checks.require(
        tolerance > 0 and len(spacing) == 3 and min(spacing) > 0,
        f"tolerance is {tolerance} mm and spacing {tuple(spacing)} mm; all must be "
        "greater than 0.",
    )
    within = tolerance * (1 + ROUNDING)
    measure = surface_distance.compute_surface_dice_at_tolerance
    return by_class(
        lambda distances: measure(distances, within),
        prediction,
        truth,
        spacing=spacing,
        num_classes=num_classes,
        missed=0.0,
        workers=workers,
    )


def by_class(
    measure: Callable[[dict], float],
    prediction: np.ndarray,
    truth: np.ndarray,
    *,
    spacing: Sequence[float],
    num_classes: int,
    missed: float,
    workers: int | None = None,
) -> np.ndarray:
    """Apply `measure` to the surface distances of each class.

    Args:
        measure: of what `surface_distance.compute_surface_distances` returns.
        prediction: class ids `[X, Y, Z]`.
        truth: class ids of the same shape.
        spacing: sides of a voxel in mm.
        num_classes: classes K, the background among them.
        missed: the result for a class of the truth that is not predicted.
        workers: classes measured at once; by default as many as there are CPU cores.

    Returns:
        float64 `[K]`; NaN for the background and classes absent from the truth.
    """
    checks.require(
        prediction.ndim == 3 and prediction.shape == truth.shape,
        f"prediction has shape {prediction.shape} and truth {truth.shape}; both must "
        "be label maps of the same voxels along three axes.",
    )
    boxes = [ndimage.find_objects(x, num_classes - 1) for x in (truth, prediction)]

    def apply(k):
        own, other = (found[k - 1] for found in boxes)
        if own is None or other is None:
            return np.nan if own is None else missed
        box = tuple(
            slice(min(a.start, b.start), max(a.stop, b.stop))
            for a, b in zip(own, other, strict=True)
        )
        return measure(
            surface_distance.compute_surface_distances(
                truth[box] == k, prediction[box] == k, spacing
            )
        )

    workers = workers or loky.cpu_count()
    with warnings.catch_warnings(), ThreadPoolExecutor(workers) as pool:
        # The library calls scipy.ndimage by the names of its old modules.
        warnings.simplefilter("ignore", DeprecationWarning)
        return np.array([np.nan, *pool.map(apply, range(1, num_classes))])
