"""A scan or crop in memory, with its labels."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from swinsmt_jax.labels import IGNORED

DRAWS = 256  # voxels tried at random before all voxels are searched


@dataclass(frozen=True)
class Sample:
    """One scan in memory, in RAS orientation.

    Attributes:
        image: [X, Y, Z], int16 HU; float32 once scaled.
        label: [X, Y, Z], uint8 label ids; unannotated voxels are `IGNORED`.
        affine: [4, 4], voxel indices to world millimetres.
        name: the case's id.
        overlapping: claims of masks to voxels of another mask.
        source_shape: shape of the file's array, in its own axes.
        source_affine: [4, 4] of the file.
        notes: facts that a user should know about the CT's file.
        source_voxels: {label id: voxels} in the files, before masks were merged.
        absent: classes without a mask, which count as absent.
        annotated: label ids of the classes that are annotated; None for all.
    """

    image: np.ndarray
    label: np.ndarray
    affine: np.ndarray
    name: str
    overlapping: int = 0
    source_shape: tuple[int, ...] = ()
    source_affine: np.ndarray = field(default_factory=lambda: np.eye(4))
    notes: tuple[str, ...] = ()
    source_voxels: Mapping[int, int] = field(default_factory=dict)
    absent: tuple[str, ...] = ()
    annotated: tuple[int, ...] | None = None

    @property
    def top(self) -> int:
        """The largest label id."""
        return int(np.where(self.label == IGNORED, 0, self.label).max())

    def annotated_mask(self, num_classes: int) -> np.ndarray:
        """Return the annotated label ids as bool [K]; the background always is one."""
        found = np.full(num_classes, self.annotated is None)
        found[[0, *(self.annotated or ())]] = True
        return found

    def bounds(self, air: float) -> tuple[slice, ...]:
        """Return the box for crops: the whole sample."""
        return tuple(slice(0, n) for n in self.label.shape)

    def draw_centre(
        self, rng: np.random.Generator, *, labelled: bool, air: float
    ) -> Sequence[int] | None:
        """Draw a labelled voxel, or another with image > air; None if there is none."""

        def wanted(where):
            label = self.label[where]
            if labelled:
                return (label > 0) & (label != IGNORED)
            return (label == 0) & (self.image[where] > air)

        shape = self.label.shape
        tries = rng.integers(shape, size=(DRAWS, 3))
        hits = np.flatnonzero(wanted(tuple(tries.T)))
        if hits.size:
            return tries[hits[0]].tolist()
        voxels = np.flatnonzero(wanted(...))
        if voxels.size == 0:
            return None
        return [int(i) for i in np.unravel_index(rng.choice(voxels), shape)]

    def lost(self, names: Sequence[str]) -> dict[str, int]:
        """Return {class: voxels in the files} of classes that have no voxel left."""
        left = np.bincount(self.label.reshape(-1), minlength=256)
        ids = range(1, len(names))
        found = {i: self.source_voxels.get(i, 0) for i in ids if left[i] == 0}
        return {names[i]: voxels for i, voxels in found.items() if voxels}

    def read(self, box: Sequence[slice]) -> "Sample":
        """Return the voxels of a box."""
        box = tuple(box)
        affine = self.affine @ voxel_step([part.start for part in box])
        return replace(
            self, image=self.image[box], label=self.label[box], affine=affine
        )


def foreground_box(image: np.ndarray, *, air: float) -> tuple[slice, ...]:
    """Return the smallest box around the voxels > air; without any, the whole image."""
    from scipy import ndimage  # half of what `load` would take to import

    found = ndimage.find_objects((image > air).view(np.uint8))
    return found[0] if found else tuple(slice(0, n) for n in image.shape)


def voxel_step(
    offset: Sequence[float], scale: Sequence[float] = (1.0, 1.0, 1.0)
) -> np.ndarray:
    """Return the affine [4, 4] from the voxels of a new grid to those of an old one."""
    step = np.diag([*scale, 1.0])
    step[:3, 3] = offset
    return step
