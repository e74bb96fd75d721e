"""The labels of one scan, as they are written."""

import dataclasses
import functools
from collections.abc import Mapping

import numpy as np
from scipy import ndimage

from swinsmt_jax.data.volume import Volume


@dataclasses.dataclass(frozen=True)
class Result:
    """The labels of one scan and what they mean.

    Attributes:
        volume: the scan, HU, in RAS orientation.
        labels: uint8 [X, Y, Z] on its grid.
        names: of the label ids that are written.
        usual_ml: {structure: (1st percentile, 99th percentile)} of its volume in the
            training set; {} if unknown.
        probability: of each voxel's label, float16 [X, Y, Z]; None if unknown.
        close: whether the second class is within 0.1 of it, bool [X, Y, Z].
        chosen: {class: its probability in steps of 1/255, uint8 [X, Y, Z]}.
    """

    volume: Volume
    labels: np.ndarray
    names: Mapping[int, str]
    usual_ml: Mapping[str, tuple[float, ...]] = dataclasses.field(default_factory=dict)
    probability: np.ndarray | None = None
    close: np.ndarray | None = None
    chosen: Mapping[str, np.ndarray] = dataclasses.field(default_factory=dict)

    @property
    def voxel_ml(self) -> float:
        """Millilitres of one voxel."""
        return abs(float(np.linalg.det(self.volume.affine[:3, :3]))) / 1000

    @functools.cached_property
    def boxes(self) -> dict[int, tuple[slice, slice, slice]]:
        """The smallest box around each structure present, by label id."""
        found = ndimage.find_objects(self.labels, max_label=max(self.names, default=0))
        return {
            number: found[number - 1]
            for number in self.names
            if found[number - 1] is not None
        }

    def mask(self, number: int) -> np.ndarray:
        """Where a structure is, bool, in its box."""
        return self.labels[self.boxes[number]] == number

    def to_mm(self, voxels: np.ndarray) -> np.ndarray:
        """Bring voxel indices [n, 3] to mm to the right, front and head."""
        affine = self.volume.affine
        return voxels @ affine[:3, :3].T + affine[:3, 3]
