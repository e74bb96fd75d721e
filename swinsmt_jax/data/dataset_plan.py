"""Facts of a dataset, and the voxels and patch that fit it.

The spacing follows nnU-Net's fingerprint (Isensee et al., Nature Methods 2021): the
median of each axis. If one axis is three times as coarse as the finest and has three
times fewer planes, it gets its 10th percentile.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from swinsmt_jax.data import nifti
from swinsmt_jax.data.case import Case
from swinsmt_jax.data.spacing import Sides, plain

COARSE = 3  # times the finest axis
RARE = 0.001  # share of the labelled voxels
MOST_VOXELS = 128**3  # of a patch


@dataclass(frozen=True)
class Finding:
    """Facts of a dataset.

    Attributes:
        sides: of each scan's voxels in mm, to the right, front and head, `[cases, 3]`.
        shapes: of each scan in voxels, `[cases, 3]`.
        counts: labelled voxels of each case and class id, `[cases, K]`.
        annotated: whether each case annotates each class, bool `[cases, K]`.
    """

    sides: np.ndarray
    shapes: np.ndarray
    counts: np.ndarray
    annotated: np.ndarray

    def spacing(self) -> Sides:
        """Return the proposed sides of a voxel in mm."""
        found = np.median(self.sides, axis=0)
        planes = np.median(self.shapes, axis=0)
        worst = int(np.argmax(found))
        others = [axis for axis in range(3) if axis != worst]
        thick = found[worst] > COARSE * found[others].min()
        if thick and planes[worst] * COARSE < planes[others].min():
            low = np.percentile(self.sides[:, worst], 10)
            found[worst] = max(low, found[others].max())
        return plain([round(float(side), 2) for side in found])

    def patch(self, *, stride: int = 32) -> tuple[int, int, int]:
        """Return sides of a patch in voxels of that grid.

        They are multiples of `stride`, and not more than the median scan needs. If that
        has more than `MOST_VOXELS`, the patch takes its proportions.
        """
        extent = np.median(self.sides * self.shapes, axis=0)
        sides = np.maximum(1, np.ceil(extent / self.spacing() / stride)) * stride
        while sides.prod() > MOST_VOXELS:
            sides[np.argmax(sides)] -= stride
        return int(sides[0]), int(sides[1]), int(sides[2])


def look_at(cases: Sequence[Case]) -> Finding:
    """Read the headers of scans, and the labels whole.

    Raises:
        UserError: as `case.load_case`, for headers and labels.
    """
    grids = [nifti.grid_of(case.ct) for case in cases]
    counts, annotated = [], []
    for case in cases:
        sample, number = case.read(), case.classes.num_classes
        counts.append(np.bincount(sample.label.reshape(-1), minlength=number)[:number])
        annotated.append(sample.annotated_mask(number))
    return Finding(
        np.array([grid.spacing for grid in grids]),
        np.array([grid.array.shape for grid in grids]),
        np.array(counts),
        np.array(annotated),
    )
