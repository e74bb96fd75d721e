"""The body's outline, lungs, organs and vessels."""

import numpy as np

from swinsmt_jax.data.anatomy import solids
from swinsmt_jax.data.anatomy.frame import (
    RIB_FALL,
    RIB_FRONT,
    RIB_WIDTH,
    VERTEBRAE,
    Painter,
    spine_y,
)
from swinsmt_jax.data.anatomy.solids import Solid

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


def diaphragm(p: Painter) -> tuple[Solid, Solid]:
    """Return the spaces under the right and the left dome of the diaphragm."""
    return tuple(
        solids.ellipsoid((x, 15, top + p.move(6)[0] - 105), (98, 118, 105))
        for x, top in ((68, 258), (-68, 246))
    )


def draw_lungs(p: Painter, domes: tuple[Solid, Solid]) -> None:
    """Draw the five lobes, cut from the rib cage by diaphragm and fissures."""
    cage = _cage()
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


def draw_abdomen(p: Painter, domes: tuple[Solid, Solid]) -> None:
    """Draw the organs below the diaphragm."""
    right, left = (solids.inset(dome, 3) for dome in domes)
    cage = solids.inset(_cage(), 4)
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
    stomach = [
        (-58, 5, 222),
        (-66, 38, 190),
        (-52, 72, 155),
        (-18, 88, 130),
        (18, 76, 122),
    ]
    stomach = p.vessel(stomach, [34, 37, 30, 22, 15], sd=4)
    p.put("stomach", solids.intersection(stomach, left), "bowel")
    p.fill(p.blob((-56, 58, 182), (22, 16, 24)), "gas")
    p.pair(
        "kidney", lambda: p.blob((76, -20, 115), (27, 28, 54), (0, -14, 20)), "kidney"
    )
    p.pair("adrenal_gland", _adrenal(p), "adrenal")
    colon = [
        (92, 32, -30),
        (100, 5, 40),
        (100, 20, 95),
        (58, 88, 100),
        (0, 98, 85),
        (-60, 82, 105),
        (-108, 22, 150),
        (-112, -8, 90),
        (-112, 8, 10),
        (-88, 30, -45),
        (-40, 28, -50),
        (-5, -5, -52),
        (0, -48, -75),
        (0, -50, -135),
    ]
    radii = [26, 24, 22, 20, 20, 20, 20, 17, 17, 17, 16, 17, 19, 16]
    colon = p.vessel(colon, radii, sd=5)
    p.put("colon", colon, "bowel")
    p.fill(solids.inset(colon, 4), p.rng.choice(["stool", "gas", "stool"]))
    _small_bowel(p)
    duodenum = [(22, 72, 124), (48, 55, 122), (54, 40, 95), (36, 34, 70), (0, 40, 68)]
    p.put("duodenum", p.vessel([*duodenum, (-26, 48, 88)], 12), "bowel")
    pancreas = [(36, 44, 104), (18, 50, 122), (-22, 52, 136), (-60, 30, 148)]
    p.put(
        "pancreas",
        p.vessel([*pancreas, (-88, 6, 156)], [14, 12, 10, 10, 8]),
        "pancreas",
    )
    p.put("gallbladder", p.blob((62, 76, 132), (15, 25, 16), (20, 0, 0)), "fluid")
    for sign, side in ((1, "right"), (-1, "left")):
        centre = (sign * (88 + p.move(2)[0]), -12 + p.move(6)[1], 118 + p.move(12)[2])
        radius = p.wide(12 * p.size(0.2))
        p.put(
            f"kidney_cyst_{side}",
            solids.ellipsoid(centre, radius * np.ones(3)),
            "fluid",
        )
    bladder = np.array([40, 37, 33]) * p.size(0.15)
    p.put("urinary_bladder", p.blob((0, 24, -92), bladder), "fluid")
    p.put("prostate", p.blob((0, 2, -138), (23, 19, 17), sd=2), "prostate")


def draw_neck_and_chest(p: Painter) -> None:
    """Draw heart, airways, gullet and thyroid."""
    move = p.move(4)
    ventricles = solids.ellipsoid(
        (-28, 48, 268), (58, 44, 48), turn=p.turn(10, 30, -25)
    )
    atria = solids.ellipsoid((10, 18, 300), (42, 36, 38), turn=p.turn())
    p.put("heart", solids.shift(solids.union(ventricles, atria), move), "heart")
    p.put("atrial_appendage_left", p.blob((-42, 34, 326), (16, 12, 11), sd=2), "heart")
    gullet = [(0, spine_y(z) + y, z) for z, y in ((478, 16), (420, 20), (350, 26))]
    gullet += [(-4, 2, 290), (-12, 2, 245), (-28, 12, 226)]
    p.put("esophagus", p.vessel(gullet, 8, sd=1.5), "bowel")
    windpipe = [(0, 26, 482), (0, 18, 440), (0, 6, 400), (0, 0, 362)]
    trunk = p.vessel(windpipe, 9.5, sd=1)
    branch = [(0, 0, 364), (24, -4, 342), (46, -8, 326)]
    sides = [p.vessel(branch, 7, sd=1), solids.mirror(p.vessel(branch, 7, sd=1))]
    p.put("trachea", solids.union(trunk, *sides), "gas")
    lobe = p.blob((21, 26, 470), (10, 11, 22), sd=1.5)
    bridge = solids.tube([(18, 36, 464), (-18, 36, 464)], p.wide(5))
    p.put("thyroid_gland", solids.union(lobe, solids.mirror(lobe), bridge), "thyroid")


def draw_vessels(p: Painter) -> None:
    """Draw arteries and veins."""

    def vessel(name: str, tissue: str, points: list, radius) -> None:
        p.put(name, p.vessel(points, radius, sd=1.5), tissue)

    def pair(name: str, tissue: str, points: list, radius) -> None:
        p.pair(name, lambda: p.vessel(points, radius, sd=1.5), tissue)

    veins = [[(x, 4, z), (26, 8, 308), (8, 6, 304)] for x, z in ((54, 322), (54, 294))]
    veins = [p.vessel(v, 7) for v in veins]
    veins += [solids.mirror(v) for v in veins]
    p.put("pulmonary_vein", solids.union(*veins), "venous")
    vessel(
        "inferior_vena_cava",
        "venous",
        [(16, 12, 272), (20, 8, 225), (20, 20, 150), (17, 24, 90), (12, 24, 38)],
        12,
    )
    vessel(
        "superior_vena_cava",
        "venous",
        [(26, 22, 308), (27, 32, 345), (26, 36, 378)],
        10,
    )
    pair(
        "iliac_vena",
        "venous",
        [(10, 22, 42), (28, 12, 0), (46, 0, -40), (62, 22, -90), (76, 44, -125)],
        7.5,
    )
    pair(
        "iliac_artery",
        "arterial",
        [(6, 32, 50), (36, 30, -5), (56, 24, -50), (70, 42, -95), (84, 54, -125)],
        6.5,
    )
    vessel(
        "brachiocephalic_vein_right",
        "venous",
        [(26, 36, 376), (33, 38, 400), (40, 34, 424)],
        8,
    )
    vessel(
        "brachiocephalic_vein_left",
        "venous",
        [(26, 36, 376), (0, 46, 388), (-26, 44, 404), (-42, 36, 424)],
        8,
    )
    vessel(
        "portal_vein_and_splenic_vein",
        "portal",
        [(-84, -2, 160), (-45, 28, 148), (-8, 40, 138), (14, 46, 148), (44, 44, 168)],
        7.5,
    )
    back = [(-24, spine_y(z) + 17, z) for z in (355, 310, 265)]
    vessel(
        "aorta",
        "arterial",
        [
            (2, 34, 312),
            (12, 46, 342),
            (6, 36, 376),
            (-8, 14, 388),
            (-22, -14, 376),
            *back,
            (-18, -2, 215),
            (-14, 8, 160),
            (-13, 20, 110),
            (-8, 26, 48),
        ],
        [15, 15, 14, 14, 13, 12.5, 12, 12, 11.5, 11, 10.5, 10],
    )
    vessel(
        "brachiocephalic_trunk",
        "arterial",
        [(4, 36, 388), (16, 30, 408), (28, 24, 428)],
        7,
    )
    vessel(
        "common_carotid_artery_right",
        "arterial",
        [(29, 25, 430), (29, 16, 470), (32, 18, 525)],
        5,
    )
    vessel(
        "common_carotid_artery_left",
        "arterial",
        [(-6, 24, 396), (-22, 22, 430), (-29, 16, 470), (-32, 18, 525)],
        5,
    )
    vessel(
        "subclavian_artery_right",
        "arterial",
        [(34, 20, 432), (54, 10, 444), (90, -2, 436), (122, -10, 428)],
        5.5,
    )
    vessel(
        "subclavian_artery_left",
        "arterial",
        [(-14, 2, 394), (-26, 4, 425), (-54, 8, 444), (-90, -2, 436), (-122, -10, 428)],
        5.5,
    )


def _cage() -> Solid:
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


def _adrenal(p: Painter):
    def build() -> Solid:
        base = np.array([36, 4, 170]) + p.move(3)
        legs = [(-3, -14, -14), (8, -10, -16)]
        r = p.wide(4)
        tubes = [solids.tube([base + (0, 8, 8), base, base + leg], r) for leg in legs]
        return solids.union(*tubes)

    return build


def _small_bowel(p: Painter) -> None:
    """Loops in rows that fill the middle of the abdomen."""
    points = []
    for row, z in enumerate(np.linspace(75, -45, 6)):
        x = np.linspace(-72, 66, 4) * (1 if row % 2 else -1)
        y = 52 + 20 * (-1.0) ** np.arange(4) - 0.12 * abs(z - 20)
        points += [
            (a, b, z + c)
            for a, b, c in zip(x, y, p.move(5, 5, 5).repeat(2), strict=False)
        ]
    bowel = p.vessel(points, 13, sd=5)
    p.put("small_bowel", bowel, "bowel")
    p.fill(solids.inset(bowel, 4), "chyme")
