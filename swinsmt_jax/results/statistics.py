"""Sizes and densities of the structures of a scan."""

import json

import numpy as np
from scipy.spatial import ConvexHull, distance

from swinsmt_jax.results.result import Result
from swinsmt_jax.runtime import csv_text

PERCENTILES = (5, 25, 50, 75, 95)
BANDS = (-np.inf, -190, -30, 150, np.inf)  # air and lung, fat, soft tissue, dense; HU
AXES = ("right", "front", "head")
CONFIDENCE = ("mean_probability", "p5_probability", "share_within_0.1_of_second")


def measure(result: Result) -> dict[str, dict[str, float | None]]:
    """Return measurements of each structure, with units in their names.

    Volumes are in ml. Masses are in g, at a density of 1 + HU / 1000 g/ml and at least
    0, which is exact for air and water and an approximation elsewhere. Boxes reach to
    the outer edges of voxels, in mm to the right, front and head. The diameter is the
    largest distance between the centres of two voxels. Where they are known,
    probabilities (0 to 1) of the voxels' label follow, their 5th percentile, and the
    share of voxels whose second class is within 0.1. A structure that is not there
    has 0 voxels and None for what needs one.
    """
    empty = dict.fromkeys(_columns(result))
    return {
        name: _measure(result, number)
        if number in result.boxes
        else {**empty, "voxels": 0, "volume_ml": 0.0}
        for number, name in result.names.items()
    }


def as_csv(result: Result) -> str:
    """Return the measurements as CSV, a row for each structure."""
    rows = [
        [name, *("" if x is None else x for x in row.values())]
        for name, row in measure(result).items()
    ]
    return csv_text.as_csv([["class", *_columns(result)], *rows])


def as_json(result: Result) -> str:
    """Return the measurements as JSON."""
    content = {
        "scan": str(result.volume.path),
        "voxel_ml": result.voxel_ml,
        "structures": measure(result),
    }
    return json.dumps(content, indent=1) + "\n"


def confidence(probability: np.ndarray, close: np.ndarray) -> list[float]:
    """Return the values of `CONFIDENCE` of a structure's voxels, [n]."""
    share = probability.astype(np.float64)
    found = share.mean(), np.percentile(share, 5), close.mean()
    return np.round(found, 4).tolist()


def _columns(result):
    return [
        *("voxels", "volume_ml", "mean_hu", "sd_hu"),
        *(f"p{p}_hu" for p in PERCENTILES),
        "mass_g",
        *(f"mass_g_{_band(*pair)}" for pair in zip(BANDS, BANDS[1:], strict=False)),
        *(f"{axis}_{end}_mm" for axis in AXES for end in ("min", "max")),
        "largest_diameter_mm",
        *(() if result.probability is None else CONFIDENCE),
    ]


def _band(low, high):
    if low == -np.inf:
        return f"below_{high}_hu"
    return f"from_{low}_hu" if high == np.inf else f"{low}_to_{high}_hu"


def _measure(result, number):
    box, mask = result.boxes[number], result.mask(number)
    hu = result.volume.array[box][mask].astype(np.float64)
    grams = np.maximum(1 + hu / 1000, 0) * result.voxel_ml
    bands = np.bincount(
        np.digitize(hu, BANDS[1:-1]), weights=grams, minlength=len(BANDS) - 1
    )
    start = [part.start for part in box]
    corners = np.array(
        [
            [
                part.stop - 0.5 if at else part.start - 0.5
                for part, at in zip(box, c, strict=True)
            ]
            for c in np.ndindex(2, 2, 2)
        ]
    )
    edges = result.to_mm(corners)
    sides = np.stack([edges.min(0), edges.max(0)], axis=1).ravel()
    values = [
        len(hu),
        round(len(hu) * result.voxel_ml, 3),
        *np.round([hu.mean(), hu.std(), *np.percentile(hu, PERCENTILES)], 1).tolist(),
        *np.round([grams.sum(), *bands], 3).tolist(),
        *np.round(sides, 2).tolist(),
        round(_diameter(result, mask, start), 2),
        *_confidence(result, box, mask),
    ]
    return dict(zip(_columns(result), values, strict=True))


def _confidence(result, box, mask):
    if result.probability is None:
        return []
    return confidence(result.probability[box][mask], result.close[box][mask])


def _diameter(result, mask, start):
    """Return the largest distance in mm between the centres of two voxels of a mask."""
    columns = np.argwhere(mask.any(axis=2))
    along = mask[columns[:, 0], columns[:, 1]]
    ends = (along.argmax(1), along.shape[1] - 1 - along[:, ::-1].argmax(1))
    points = np.concatenate([np.column_stack([columns, end]) for end in ends])
    points = result.to_mm(np.unique(points, axis=0) + start)
    if len(points) > 100:  # hulls of flat bodies need to be joggled
        points = points[ConvexHull(points, qhull_options="QJ").vertices]
    return float(distance.pdist(points).max()) if len(points) > 1 else 0.0
