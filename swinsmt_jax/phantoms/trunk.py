"""The body's outline, the space inside the ribs, diaphragm and lungs."""

import numpy as np

from swinsmt_jax.phantoms import solids
from swinsmt_jax.phantoms.frame import (
    RIB_FALL,
    RIB_FRONT,
    RIB_WIDTH,
    VERTEBRAE,
    Painter,
    spine_y,
)
from swinsmt_jax.phantoms.solids import Solid

# fmt: off
# Height, centre (x, y), half width and half depth of the trunk's skin and the belly.
TRUNK = [
    (-170, 0, -9, 168, 104), (-100, 0, -5, 172, 114), (-40, 0, 4, 168, 118),
    (40, 0, 16, 160, 117), (110, 0, 16, 160, 121), (190, 0, 9, 166, 124),
    (260, 0, 2, 169, 125), (330, 0, -9, 170, 117), (390, 0, -26, 164, 100),
    (425, 0, -34, 140, 82), (450, 0, -25, 95, 64), (470, 0, -12, 66, 60),
]
BELLY = [
    (-120, 0, 15, 95, 60), (-60, 0, 28, 118, 70), (20, 0, 36, 125, 76),
    (110, 0, 34, 132, 82), (200, 0, 25, 135, 85),
]
NECK = {440: 75, 480: 60, 530: 58, 560: 66, 585: 60}  # half width at each height
ARM_UP = [
    (150, -28, 408), (175, -18, 500), (172, -4, 610), (140, 25, 760), (150, 40, 780),
]
ARM_DOWN = [
    (152, -28, 408), (190, -24, 330), (197, -14, 150), (196, 15, -60), (185, 45, -130),
]
# fmt: on


def draw_outline(p: Painter, *, arms_up: bool) -> None:
    """Draw table, skin, fat and the muscles that belong to no class."""
    p.fill(solids.slab((0, -150, 250), (215, 9, 900)), "foam")
    p.fill(solids.slab((0, -158, 250), (215, 2.5, 900)), "plastic")
    fat = 15 + 8 * p.variation * float(np.clip(p.rng.standard_normal(), -1.2, 2))
    trunk = solids.stack(TRUNK, shrink=15 - fat)
    neck = solids.stack(
        [(z, 0, 4 + 0.1 * (z - 480), r, r + 4) for z, r in NECK.items()]
    )
    skull = solids.ellipsoid((0, 18, 643), (80, 101, 92))
    head = solids.union(skull, solids.ellipsoid((0, 58, 585), (62, 64, 70)))
    arm = p.vessel(ARM_UP if arms_up else ARM_DOWN, [54, 44, 40, 34, 26])
    leg = solids.tube([(88, 0, -120), (96, -5, -420)], (84, 76))
    limbs = [arm, solids.mirror(arm), leg, solids.mirror(leg)]
    body = solids.union(trunk, neck, head, *limbs)
    p.fill(body, "skin")
    p.fill(solids.inset(body, 3), "fat")
    lean = solids.union(
        solids.inset(trunk, fat + 2),
        solids.inset(solids.union(neck, head), 5),
        solids.inset(solids.union(*limbs), 0.7 * fat),
    )
    p.fill(lean, "muscle")
    p.fill(solids.stack(BELLY), "visceral fat")


def rib_cage() -> Solid:
    """The space inside the ribs, from the apex down to the costal margin."""
    rows: list[tuple[float, ...]] = [(100, 0, 22, 128, 84)]
    for n in range(10, 0, -1):
        z = VERTEBRAE[f"T{n}"]
        back, front = spine_y(z) - 36, RIB_FRONT[n - 1] - 9
        low, middle = z - 0.42 * RIB_FALL[n - 1], (front + back) / 2
        rows.append((low, 0, middle, RIB_WIDTH[n - 1] - 9, (front - back) / 2))
    return solids.stack([*rows, (455, 0, -18, 30, 26)])


def diaphragm(p: Painter) -> tuple[Solid, Solid]:
    """Return the spaces under the right and the left dome of the diaphragm."""
    right, left = (
        solids.ellipsoid((x, 15, top + p.move(6)[0] - 105), (98, 118, 105))
        for x, top in ((68, 258), (-68, 246))
    )
    return right, left


def draw_lungs(p: Painter, domes: tuple[Solid, Solid]) -> None:
    """Draw the five lobes, cut from the rib cage by diaphragm and fissures."""
    cage = rib_cage()
    p.fill(cage, "mediastinum")
    for sign, side, dome in ((1, "right", domes[0]), (-1, "left", domes[1])):
        medial = solids.half_space((20 * sign, 0, 0), (-sign, 0, 0))
        lung = solids.difference(solids.intersection(cage, medial), dome)
        tilt = p.move(8)[0]
        lower = solids.half_space((0, -80, 385 + tilt), (0, 0.68, 0.73))
        middle = solids.half_space((0, 0, 322 + tilt), (0, 0, 1))
        lobes = [(f"lung_upper_lobe_{side}", lung)]
        if side == "right":
            lobes.append(("lung_middle_lobe_right", solids.intersection(lung, middle)))
        lobes.append((f"lung_lower_lobe_{side}", solids.intersection(lung, lower)))
        for name, lobe in lobes:
            p.put(name, lobe, "lung")
