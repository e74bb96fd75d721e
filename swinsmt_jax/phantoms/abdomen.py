"""Organs below the diaphragm."""

import numpy as np

from swinsmt_jax.phantoms import solids
from swinsmt_jax.phantoms.frame import Painter
from swinsmt_jax.phantoms.solids import Solid
from swinsmt_jax.phantoms.trunk import rib_cage

# fmt: off
# Points along the hollow organs, and their radii.
STOMACH = [(-58, 5, 222), (-66, 38, 190), (-52, 72, 155), (-18, 88, 130), (18, 76, 122)]
COLON = [
    (92, 32, -30), (100, 5, 40), (100, 20, 95), (58, 88, 100), (0, 98, 85),
    (-60, 82, 105), (-108, 22, 150), (-112, -8, 90), (-112, 8, 10), (-88, 30, -45),
    (-40, 28, -50), (-5, -5, -52), (0, -48, -75), (0, -50, -135),
]
COLON_RADII = [26, 24, 22, 20, 20, 20, 20, 17, 17, 17, 16, 17, 19, 16]
DUODENUM = [
    (22, 72, 124), (48, 55, 122), (54, 40, 95), (36, 34, 70), (0, 40, 68),
    (-26, 48, 88),
]
PANCREAS = [(36, 44, 104), (18, 50, 122), (-22, 52, 136), (-60, 30, 148), (-88, 6, 156)]
# fmt: on


def draw_abdomen(p: Painter, domes: tuple[Solid, Solid]) -> None:
    """Draw the organs below the diaphragm."""
    right, left = (solids.inset(dome, 3) for dome in domes)
    cage = solids.inset(rib_cage(), 4)
    top = right.high[2]
    lobe = p.blob((76, 26, top - 96), (80, 98, 98), (0, 0, -10), sd=3)
    under = solids.half_space((100, 0, 68 + p.move(6)[0]), (-0.5, 0.1, -1))
    lobe = solids.intersection(lobe, right, under)
    left_lobe = p.blob((-8, 66, top - 62), (64, 40, 32), (0, -14, 0), sd=5)
    left_lobe = solids.intersection(left_lobe, solids.union(right, left))
    liver = solids.intersection(solids.union(lobe, left_lobe), cage)
    p.put("liver", liver, "liver")
    spleen = p.blob((-100, -24, left.high[2] - 74), (33, 46, 56), (20, -14, 20))
    p.put("spleen", solids.intersection(spleen, cage, left), "spleen")
    stomach = p.vessel(STOMACH, [34, 37, 30, 22, 15], sd=4)
    p.put("stomach", solids.intersection(stomach, left), "bowel")
    p.fill(p.blob((-56, 58, 182), (22, 16, 24)), "gas")
    kidney = (76, -20, 115), (27, 28, 54), (0, -14, 20)
    p.pair("kidney", lambda: p.blob(*kidney), "kidney")
    p.pair("adrenal_gland", lambda: _adrenal_gland(p), "adrenal")
    colon = p.vessel(COLON, COLON_RADII, sd=5)
    p.put("colon", colon, "bowel")
    p.fill(solids.inset(colon, 4), p.rng.choice(["stool", "gas", "stool"]))
    _small_bowel(p)
    p.put("duodenum", p.vessel(DUODENUM, 12), "bowel")
    p.put("pancreas", p.vessel(PANCREAS, [14, 12, 10, 10, 8]), "pancreas")
    p.put("gallbladder", p.blob((62, 76, 132), (15, 25, 16), (20, 0, 0)), "fluid")
    for sign, side in ((1, "right"), (-1, "left")):
        centre = (sign * (88 + p.move(2)[0]), -12 + p.move(6)[1], 118 + p.move(12)[2])
        radii = p.wide(12 * p.size(0.2)) * np.ones(3)
        p.put(f"kidney_cyst_{side}", solids.ellipsoid(centre, radii), "fluid")
    bladder = np.array([40, 37, 33]) * p.size(0.15)
    p.put("urinary_bladder", p.blob((0, 24, -92), bladder), "fluid")
    p.put("prostate", p.blob((0, 2, -138), (23, 19, 17), sd=2), "prostate")


def _adrenal_gland(p: Painter) -> Solid:
    base = np.array([36, 4, 170]) + p.move(3)
    legs = [(-3, -14, -14), (8, -10, -16)]
    r = p.wide(4)
    tubes = [solids.tube([base + (0, 8, 8), base, base + leg], r) for leg in legs]
    return solids.union(*tubes)


def _small_bowel(p: Painter) -> None:
    """Loops in rows that fill the middle of the abdomen."""
    points = []
    for row, z in enumerate(np.linspace(75, -45, 6)):
        x = np.linspace(-72, 66, 4) * (1 if row % 2 else -1)
        y = 52 + 20 * (-1.0) ** np.arange(4) - 0.12 * abs(z - 20)
        up = p.move(5, 5, 5).repeat(2)
        points += [(a, b, z + c) for a, b, c in zip(x, y, up, strict=False)]
    bowel = p.vessel(points, 13, sd=5)
    p.put("small_bowel", bowel, "bowel")
    p.fill(solids.inset(bowel, 4), "chyme")
