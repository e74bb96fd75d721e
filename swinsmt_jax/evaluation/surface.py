"""Distances between the surfaces of structures in two label maps.

The surface of a structure is a set of elements, at the corners of voxels or at voxels.
Each element looks for the nearest one of the other surface: first among its neighbours
on the grid, which is enough for most of them, the rest in a k-d tree.
"""

import functools
import itertools
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import NamedTuple

import loky
import numpy as np
from scipy import ndimage, spatial
from surface_distance import lookup_tables

from swinsmt_jax import checks

TOLERANCE = 3.0  # mm, as in TotalSegmentator's evaluation
ROUNDING = 1e-6  # of the tolerance: headers hold spacings in float32
REACH = 2  # voxels on each axis that are searched as neighbours
SLAB = 1 << 18  # voxels whose corners are looked at together, which bounds the memory


@dataclass(frozen=True)
class SurfaceRule:
    """What counts as surface, and when two surfaces count as one.

    Attributes:
        tolerance: mm within which two surfaces count as one; None for the smallest side
            of a voxel.
        spacing: sides of a voxel in mm, if not those of the scan.
        elements: "corners", of voxels, each with its area as DeepMind's
            surface-distance gives it; or "voxels", which have a face outside.
        cut_faces: whether faces where the scan ends are surface.
        slack: share of the tolerance that is granted to rounded headers.
        nowhere: the voxel to which distances to a missing surface are measured, if they
            are not infinite.
    """

    tolerance: float | None = TOLERANCE
    spacing: tuple[float, float, float] | None = None
    elements: str = "corners"
    cut_faces: bool = True
    slack: float = ROUNDING
    nowhere: tuple[int, int, int] | None = None


class Distances(NamedTuple):
    """Of one class, from each surface to the nearest element of the other.

    Attributes:
        truth: mm, float64 `[n]`, from each element of the truth's surface; infinite if
            the prediction has none.
        prediction: the same `[m]` from each element of the prediction's surface.
        truth_area, prediction_area: of the elements, in mm²; 1 for "voxels".
        spacing: sides of a voxel in mm.
    """

    truth: np.ndarray
    prediction: np.ndarray
    truth_area: np.ndarray
    prediction_area: np.ndarray
    spacing: tuple[float, ...]

    @property
    def both(self) -> bool:
        """Whether truth and prediction have a surface."""
        return bool(self.truth.size and self.prediction.size)

    def within(self, rule: SurfaceRule) -> float:
        """Return the mm up to which two surfaces count as one."""
        tolerance = min(self.spacing) if rule.tolerance is None else rule.tolerance
        return tolerance * (1 + rule.slack)


Measure = Callable[[Distances, SurfaceRule], float]


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

    Nikolov et al. 2018, arXiv:1809.04430. Arguments and errors as in `by_class`.

    Returns:
        float64 `[K]`; 0 for a class that was missed, NaN for the background and classes
        absent from the truth.
    """
    found = by_class(
        {"": share_within},
        prediction,
        truth,
        spacing=spacing,
        num_classes=num_classes,
        rule=SurfaceRule(tolerance),
        workers=workers,
    )
    return found[""]


def share_within(distances: Distances, rule: SurfaceRule) -> float:
    """Share of both surfaces' area within the tolerance; NaN if the truth is empty."""
    if not distances.truth.size:
        return np.nan
    within = distances.within(rule)
    near = distances.truth_area[distances.truth <= within].sum()
    near += distances.prediction_area[distances.prediction <= within].sum()
    return near / (distances.truth_area.sum() + distances.prediction_area.sum())


def by_class(
    measures: Mapping[str, Measure],
    prediction: np.ndarray,
    truth: np.ndarray,
    *,
    spacing: Sequence[float],
    num_classes: int,
    rule: SurfaceRule,
    workers: int | None = None,
) -> dict[str, np.ndarray]:
    """Measure the surfaces of each class, whose distances are computed once.

    Args:
        measures: by name; also of classes that truth, prediction or both lack.
        prediction: class ids `[X, Y, Z]`.
        truth: class ids of the same shape.
        spacing: sides of a voxel in mm, unless the rule has others.
        num_classes: classes K, the background among them.
        rule: what counts as surface; measures get it too.
        workers: classes measured at once; by default as many as there are CPU cores.

    Returns:
        float64 `[K]` by name; NaN for the background.

    Raises:
        UserError: for other shapes, or a spacing or tolerance that is not positive.
    """
    sides = ", ".join(f"{side:g}" for side in rule.spacing or spacing)
    spacing = tuple(map(float, rule.spacing or spacing))
    checks.require(
        (rule.tolerance is None or rule.tolerance > 0)
        and len(spacing) == 3
        and min(spacing) > 0,
        f"tolerance is {rule.tolerance} mm and spacing ({sides}) mm; all must be "
        "greater than 0.",
    )
    checks.require(
        prediction.ndim == 3 and prediction.shape == truth.shape,
        f"prediction has shape {prediction.shape} and truth {truth.shape}; both must "
        "be label maps of the same voxels along three axes.",
    )
    boxes = [_boxes(labels, num_classes) for labels in (truth, prediction)]
    boxes = [_around(*pair) for pair in zip(*boxes, strict=True)]
    found = {name: np.full(num_classes, np.nan) for name in measures}

    def measure(k):
        distances = _distances(prediction, truth, k, boxes[k - 1], spacing, rule)
        for name, function in measures.items():
            found[name][k] = function(distances, rule)

    largest_first = sorted(range(1, num_classes), key=lambda k: -_size(boxes[k - 1]))
    with ThreadPoolExecutor(workers or loky.cpu_count()) as pool:
        list(pool.map(measure, largest_first))
    return found


def _boxes(labels, num_classes):
    found = ndimage.find_objects(labels, num_classes - 1)
    return [box and tuple((side.start, side.stop) for side in box) for box in found]


def _around(one, other):
    """Return [first, end] of each axis of the box around two boxes; None for none."""
    pairs = [box for box in (one, other) if box is not None]
    if not pairs:
        return None
    sides = zip(*pairs, strict=True)
    return [(min(a for a, _ in side), max(b for _, b in side)) for side in sides]


def _size(box):
    return 0 if box is None else np.prod([end - first for first, end in box])


def _distances(prediction, truth, k, box, spacing, rule):
    if box is None:
        return Distances(*[np.zeros(0)] * 4, spacing)
    grid = tuple(end - first + 1 + 2 * REACH for first, end in box)
    (own, own_area), (other, other_area) = (
        _elements(labels, k, box, grid, spacing, rule) for labels in (truth, prediction)
    )
    missing = None
    if rule.nowhere is not None:  # in voxels of the padded box
        pairs = zip(rule.nowhere, box, strict=True)
        missing = [place - first + REACH for place, (first, _) in pairs]
    nearest = functools.partial(_nearest, grid=grid, spacing=spacing, missing=missing)
    return Distances(
        nearest(own, other), nearest(other, own), own_area, other_area, spacing
    )


def _elements(labels, k, box, grid, spacing, rule):
    """Return a surface: indices into the padded grid, int64 `[n]`, and areas."""
    (first, end), rows, columns = box
    inner = labels[first:end, slice(*rows), slice(*columns)]
    top, *ends = [(a == 0, b == n) for (a, b), n in zip(box, labels.shape, strict=True)]
    height, *plane = (n + 1 for n in inner.shape)
    step = max(1, SLAB // (plane[0] * plane[1]))
    places, codes = [], []
    for start in range(0, height, step):
        stop = min(start + step, height)
        # The voxels of these planes, one more before and behind, and around them none.
        part = np.zeros((stop - start + 2, plane[0] + 1, plane[1] + 1), np.uint8)
        low, high = max(start - 1, 0), min(stop + 1, height - 1)
        part[low - start + 1 : high - start + 1, 1:-1, 1:-1] = inner[low:high] == k
        code = KINDS[rule.elements](part)
        if not rule.cut_faces:
            here = (top[0] and start == 0, top[1] and stop == height)
            _without_cut_faces(code, [here, *ends])
        at = np.flatnonzero(code - np.uint8(1) < 254)
        codes.append(code.reshape(-1)[at])
        x, y, z = np.unravel_index(at, code.shape)
        x += start
        places.append(((x + REACH) * grid[1] + y + REACH) * grid[2] + z + REACH)
    codes = np.concatenate(codes)
    areas = np.ones(codes.size)
    if rule.elements == "corners":
        areas = _areas(spacing)[codes]
    return np.concatenate(places), areas


def _corner_codes(part):
    """Return the 8 voxels around each corner as bits, the first one as 128."""
    part = part[:-1]
    code = (part[:, :, :-1] << 1) | part[:, :, 1:]
    code = (code[:, :-1] << 2) | code[:, 1:]
    return (code[:-1] << 4) | code[1:]


def _surface_voxels(part):
    """Return 1 where a voxel has a face outside."""
    inside = part[:-2, 1:-1, 1:-1] & part[2:, 1:-1, 1:-1]
    inside &= part[1:-1, :-2, 1:-1] & part[1:-1, 2:, 1:-1]
    inside &= part[1:-1, 1:-1, :-2] & part[1:-1, 1:-1, 2:]
    return part[1:-1, 1:-1, 1:-1] & ~inside


KINDS = {"corners": _corner_codes, "voxels": _surface_voxels}


def _without_cut_faces(code, ends):
    """Clear the corners at the ends of the scan: per axis, whether they are here."""
    for axis, (first, last) in enumerate(ends):
        side = np.moveaxis(code, axis, 0)
        if first:
            side[0] = 0
        if last:
            side[-1] = 0


@functools.lru_cache(maxsize=64)
def _areas(spacing):
    return lookup_tables.create_table_neighbour_code_to_surface_area(spacing)


def _nearest(own, other, *, grid, spacing, missing):
    """Return the mm, float64 `[n]`, from elements to the nearest of the others."""
    found = np.full(own.size, np.inf)
    if not other.size:
        if missing is not None:
            found = _lengths(_places(own, grid) - missing, spacing)
        return found
    there = np.zeros(np.prod(grid), bool)
    there[other] = True
    rest, at = np.arange(own.size), own
    for step, mm in _neighbours(spacing):
        jump = (step[0] * grid[1] + step[1]) * grid[2] + step[2]
        hit = there[at + jump]
        found[rest[hit]] = mm
        rest, at = rest[~hit], at[~hit]
        if not rest.size:
            return found
    places, others = _places(at, grid), _places(other, grid)
    tree = spatial.cKDTree(others * spacing, leafsize=32, balanced_tree=False)
    _, which = tree.query(places * spacing)
    found[rest] = _lengths(places - others[which], spacing)
    return found


@functools.lru_cache(maxsize=64)
def _neighbours(spacing):
    """Return steps on the grid and their mm, as far as none beyond is nearer."""
    steps = np.array(list(itertools.product(range(-REACH, REACH + 1), repeat=3)))
    lengths = _lengths(steps, spacing)
    order = np.argsort(lengths, kind="stable")
    order = order[lengths[order] <= (REACH + 1) * min(spacing)]
    return list(zip(steps[order].tolist(), lengths[order].tolist(), strict=True))


def _places(index, grid):
    return np.stack(np.unravel_index(index, grid), axis=-1)


def _lengths(steps, spacing):
    x, y, z = (steps * np.array(spacing)).T
    return np.sqrt(x * x + y * y + z * z)
