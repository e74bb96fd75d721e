"""What all parts of a phantom share: the body's frame, its spine and rib cage, its HU.

Lengths are mm of a body of average size. The origin lies in the spine's centre between
L5 and S1; x grows to the patient's right, y to the front, z to the head. Positions and
sizes were read off CT scans by eye and are plausible, not a reference anatomy.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from swinsmt_jax import labels
from swinsmt_jax.phantoms import solids
from swinsmt_jax.phantoms.canvas import Canvas
from swinsmt_jax.phantoms.solids import Point, Solid

# Heights of the vertebral bodies' centres, from L5 up to C1.
VERTEBRAE = {
    **{"L5": 12, "L4": 46, "L3": 81, "L2": 115, "L1": 148},
    **{"T12": 180, "T11": 210, "T10": 238, "T9": 265, "T8": 291, "T7": 316, "T6": 340},
    **{"T5": 363, "T4": 385, "T3": 406, "T2": 426, "T1": 446},
    **{"C7": 465, "C6": 481, "C5": 497, "C4": 513, "C3": 529, "C2": 545, "C1": 561},
}
_SPINE_Z = [-13, 12, 46, 81, 115, 148, 180, 238, 291, 340, 385, 426, 464, 512, 561]
_SPINE_Y = [-18, -5, 2, 0, -8, -18, -27, -40, -48, -47, -38, -22, -8, 5, 10]

# Per rib 1 to 12: half width of the cage, its front, the fall of the rib from spine to
# front end in mm, and where it ends in degrees around the cage (0 spine, 180 sternum).
RIB_WIDTH = [58, 82, 102, 115, 124, 131, 136, 140, 143, 141, 138, 120]
RIB_FRONT = [45, 62, 75, 85, 95, 105, 112, 118, 118, 115, 110, 100]
RIB_FALL = [30, 55, 75, 90, 105, 120, 132, 138, 122, 105, 92, 48]
RIB_END = [150, 152, 150, 148, 145, 138, 130, 120, 110, 95, 68, 44]


def spine_y(z: float) -> float:
    """Front-back place of the vertebral bodies' centres at height z."""
    return float(np.interp(z, _SPINE_Z, _SPINE_Y))


@dataclass(frozen=True)
class Painter:
    """Draws named structures with the case's own variation.

    Attributes:
        canvas: what is drawn on.
        rng: the case's generator.
        hu: HU of each tissue in this case.
        variation: scale of all random differences between bodies; 0 draws the average.
        thinnest: least radius of a structure in mm, so that coarse grids keep it.
        absent: names of structures that this body lacks.
    """

    canvas: Canvas
    rng: np.random.Generator
    hu: dict[str, float]
    variation: float
    thinnest: float
    absent: frozenset[str] = frozenset()

    def put(self, name: str, solid: Solid, tissue: str) -> None:
        """Draw one structure of the class map."""
        if name not in self.absent:
            self.canvas.draw(solid, self.hu[tissue], labels.CLASS_IDS[name])

    def bone(self, name: str, solid: Solid, *, shell: float = 3.0) -> None:
        """Draw a bone: dense outside, spongy where deeper than `shell` mm."""
        self.put(name, solid, "cortical")
        self.canvas.draw(solids.inset(solid, shell), self.hu["spongy"])

    def fill(self, solid: Solid, tissue: str, *, erase: bool = False) -> None:
        """Draw tissue that belongs to no class; `erase` takes labels away there."""
        self.canvas.draw(solid, self.hu[tissue], 0 if erase else None)

    def pair(self, name: str, build: Callable[[], Solid], tissue: str) -> None:
        """Draw `name`_right as built and `name`_left as built again and mirrored."""
        self.put(f"{name}_right", build(), tissue)
        self.put(f"{name}_left", solids.mirror(build()), tissue)

    def bone_pair(self, name: str, build: Callable[[], Solid]) -> None:
        """`pair` for bones."""
        self.bone(f"{name}_right", build())
        self.bone(f"{name}_left", solids.mirror(build()))

    def move(self, *sd: float) -> np.ndarray:
        """Random shift [3] with standard deviations in mm (one for all, or three)."""
        draw = np.clip(self.rng.standard_normal(3), -2, 2)
        return draw * np.array(sd) * self.variation

    def size(self, sd: float = 0.08) -> float:
        """Random factor around 1."""
        draw = np.clip(self.rng.standard_normal(), -2, 2)
        return float(np.exp(draw * sd * self.variation))

    def turn(self, x: float = 0, y: float = 0, z: float = 0) -> np.ndarray:
        """Angles in degrees about the axes with some random change."""
        return np.array([x, y, z]) + self.move(5)

    def wide(self, radius: ArrayLike) -> np.ndarray:
        """Radius or radii in mm, none under the grid's least."""
        return np.maximum(np.asarray(radius, float), self.thinnest)

    def vessel(self, points: ArrayLike, radius: ArrayLike, sd: float = 2) -> Solid:
        """Smooth tube through points [n, 3] that are each shifted a little."""
        moved = [point + self.move(sd) for point in np.asarray(points, float)]
        return solids.tube(solids.spline(moved), self._along(radius, len(moved)))

    def blob(
        self,
        centre: Point,
        radii: Point,
        turn: tuple[float, float, float] = (0, 0, 0),
        *,
        sd: float = 4,
    ) -> Solid:
        """Ellipsoid with random shift, size and turn."""
        scaled = self.wide(np.asarray(radii) * self.size())
        moved = np.asarray(centre, float) + self.move(sd)
        return solids.ellipsoid(moved, scaled, turn=self.turn(*turn))

    def _along(self, radius: ArrayLike, count: int) -> np.ndarray:
        radii = np.broadcast_to(np.asarray(radius, float), count)
        dense = np.linspace(0, count - 1, 4 * (count - 1) + 1)
        return self.wide(np.interp(dense, np.arange(count), radii) * self.size())
