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

# Height, and centre y, half width and half depth of the trunk's skin.
_TRUNK = [
    (-170, -9, 168, 104),
    (-100, -5, 172, 114),
    (-40, 4, 168, 118),
    (40, 16, 160, 117),
    (110, 16, 160, 121),
    (190, 9, 166, 124),
    (260, 2, 169, 125),
    (330, -9, 170, 117),
    (390, -26, 164, 100),
    (425, -34, 140, 82),
    (450, -25, 95, 64),
    (470, -12, 66, 60),
]


def draw_outline(p: Painter, *, arms_up: bool) -> None:
    """Draw table, skin, fat and the muscles that belong to no class."""
    p.fill(solids.slab((0, -150, 250), (215, 9, 900)), "foam")
    p.fill(solids.slab((0, -158, 250), (215, 2.5, 900)), "plastic")
    fat = 15 + 8 * p.variation * float(np.clip(p.rng.standard_normal(), -1.2, 2))
    heights = [row[0] for row in _TRUNK]
    trunk = solids.stack(heights, [(0, *row[1:]) for row in _TRUNK], shrink=15 - fat)
    neck = [(440, 75), (480, 60), (530, 58), (560, 66), (585, 60)]
    neck = solids.stack(
        [z for z, _ in neck], [(0, 4 + 0.1 * (z - 480), r, r + 4) for z, r in neck]
    )
    skull = solids.ellipsoid((0, 18, 643), (80, 101, 92))
    head = solids.union(skull, solids.ellipsoid((0, 58, 585), (62, 64, 70)))
    if arms_up:
        arm = [(150, -28, 408), (175, -18, 500), (172, -4, 610), (140, 25, 760)]
    else:
        arm = [(152, -28, 408), (190, -24, 330), (197, -14, 150), (196, 15, -60)]
    arm = p.vessel(
        [*arm, (150, 40, 780) if arms_up else (185, 45, -130)], [54, 44, 40, 34, 26]
    )
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
    belly = solids.stack(
        [-120, -60, 20, 110, 200],
        [
            (0, 15, 95, 60),
            (0, 28, 118, 70),
            (0, 36, 125, 76),
            (0, 34, 132, 82),
            (0, 25, 135, 85),
        ],
    )
    p.fill(belly, "visceral fat")


def rib_cage() -> Solid:
    """The space inside the ribs, from the apex down to the costal margin."""
    rows = [(100, 22, 128, 84)]
    for n in range(10, 0, -1):
        z = VERTEBRAE[f"T{n}"]
        back, front = spine_y(z) - 36, RIB_FRONT[n - 1] - 9
        half = (front - back) / 2
        row = (
            z - 0.42 * RIB_FALL[n - 1],
            (front + back) / 2,
            RIB_WIDTH[n - 1] - 9,
            half,
        )
        rows.append(row)
    rows.append((455, -18, 30, 26))
    return solids.stack([row[0] for row in rows], [(0, *row[1:]) for row in rows])


def diaphragm(p: Painter) -> tuple[Solid, Solid]:
    """Return the spaces under the right and the left dome of the diaphragm."""
    return tuple(
        solids.ellipsoid((x, 15, top + p.move(6)[0] - 105), (98, 118, 105))
        for x, top in ((68, 258), (-68, 246))
    )


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
