"""A voxel grid on which solids are drawn, with partial volume, one over the other."""

import numpy as np
from numpy.typing import ArrayLike

from swinsmt_jax.phantoms.solids import Solid


class Canvas:
    """HU and labels on a voxel grid, drawn solid by solid; later ones cover earlier.

    Each voxel knows its place in the body, so posture and deformation bend all solids
    alike. HU are blended by the share of the voxel that the solid covers.

    Args:
        places: [3, X, Y, Z] float32, the point of the body at each voxel, in mm; it
            must grow along each axis.
        margin: mm by which the places may differ from an undeformed grid.
        origin: place of voxel 0 on that undeformed grid.
        step: mm of the body per voxel along each axis of that grid.
    """

    def __init__(
        self,
        places: np.ndarray,
        *,
        origin: ArrayLike,
        step: ArrayLike,
        margin: float,
    ):
        self.places = places
        self.hu = np.full(places.shape[1:], -1000, np.float32)
        self.labels = np.zeros(places.shape[1:], np.uint8)
        self._origin, self._step = np.asarray(origin), np.asarray(step)
        self._margin = margin
        self._side = np.float32(self._step.mean())

    @property
    def voxel(self) -> float:
        """Voxel side in mm of the body."""
        return float(self._side)

    def draw(self, solid: Solid, hu: float | None, label: int | None = None) -> None:
        """Blend the solid's HU in and label the voxels whose centre it holds.

        `hu` None leaves the image; `label` None leaves the labels, 0 erases them.
        """
        box = self._box(solid)
        if box is None:
            return
        distance = self._distance(solid, box)
        if hu is not None:
            share = np.clip(0.5 - distance / self._side, 0, 1)
            image = self.hu[box]
            image += share * (np.float32(hu) - image)
        if label is not None:
            self.labels[box][distance <= 0] = label

    def _distance(self, solid: Solid, box: tuple[slice, ...]) -> np.ndarray:
        if not solid.parts:
            return solid.distance(*self.places[(slice(None), *box)])
        shape = tuple(side.stop - side.start for side in box)
        distance = np.full(shape, np.inf, np.float32)
        for part in solid.parts:
            part_box = self._box(part)
            if part_box is None:
                continue
            inner = tuple(
                slice(p.start - b.start, p.stop - b.start)
                for p, b in zip(part_box, box, strict=True)
            )
            near = self._distance(part, part_box)
            distance[inner] = np.minimum(distance[inner], near)
        return distance

    def _box(self, solid: Solid) -> tuple[slice, ...] | None:
        margin = self._margin + self._side
        low = np.floor((solid.low - margin - self._origin) / self._step)
        high = np.ceil((solid.high + margin - self._origin) / self._step) + 1
        shape: np.ndarray = np.array(self.hu.shape)
        low, high = np.clip(low, 0, shape).astype(int), np.clip(high, 0, shape)
        if np.any(low >= high):
            return None
        return tuple(slice(a, int(b)) for a, b in zip(low, high, strict=True))
