"""Heart, airways, gullet, thyroid and vessels."""

from functools import partial

from swinsmt_jax.phantoms import solids
from swinsmt_jax.phantoms.frame import Painter, spine_y

# fmt: off
# Class, tissue, radius or radii, points from one end to the other; in this order.
VESSELS = (
    ("inferior_vena_cava", "venous", 12,
     [(16, 12, 272), (20, 8, 225), (20, 20, 150), (17, 24, 90), (12, 24, 38)]),
    ("superior_vena_cava", "venous", 10, [(26, 22, 308), (27, 32, 345), (26, 36, 378)]),
    ("iliac_vena", "venous", 7.5,
     [(10, 22, 42), (28, 12, 0), (46, 0, -40), (62, 22, -90), (76, 44, -125)]),
    ("iliac_artery", "arterial", 6.5,
     [(6, 32, 50), (36, 30, -5), (56, 24, -50), (70, 42, -95), (84, 54, -125)]),
    ("brachiocephalic_vein_right", "venous", 8,
     [(26, 36, 376), (33, 38, 400), (40, 34, 424)]),
    ("brachiocephalic_vein_left", "venous", 8,
     [(26, 36, 376), (0, 46, 388), (-26, 44, 404), (-42, 36, 424)]),
    ("portal_vein_and_splenic_vein", "portal", 7.5,
     [(-84, -2, 160), (-45, 28, 148), (-8, 40, 138), (14, 46, 148), (44, 44, 168)]),
    ("aorta", "arterial", [15, 15, 14, 14, 13, 12.5, 12, 12, 11.5, 11, 10.5, 10],
     [(2, 34, 312), (12, 46, 342), (6, 36, 376), (-8, 14, 388), (-22, -14, 376),
      *((-24, spine_y(z) + 17, z) for z in (355, 310, 265)),
      (-18, -2, 215), (-14, 8, 160), (-13, 20, 110), (-8, 26, 48)]),
    ("brachiocephalic_trunk", "arterial", 7,
     [(4, 36, 388), (16, 30, 408), (28, 24, 428)]),
    ("common_carotid_artery_right", "arterial", 5,
     [(29, 25, 430), (29, 16, 470), (32, 18, 525)]),
    ("common_carotid_artery_left", "arterial", 5,
     [(-6, 24, 396), (-22, 22, 430), (-29, 16, 470), (-32, 18, 525)]),
    ("subclavian_artery_right", "arterial", 5.5,
     [(34, 20, 432), (54, 10, 444), (90, -2, 436), (122, -10, 428)]),
    ("subclavian_artery_left", "arterial", 5.5,
     [(-14, 2, 394), (-26, 4, 425), (-54, 8, 444), (-90, -2, 436), (-122, -10, 428)]),
)
# fmt: on
PAIRED = ("iliac_vena", "iliac_artery")


def draw_chest(p: Painter) -> None:
    """Draw heart, airways, gullet and thyroid."""
    move = p.move(4)
    turn = p.turn(10, 30, -25)
    ventricles = solids.ellipsoid((-28, 48, 268), (58, 44, 48), turn=turn)
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
    lines = [[(x, 4, z), (26, 8, 308), (8, 6, 304)] for x, z in ((54, 322), (54, 294))]
    veins = [p.vessel(line, 7) for line in lines]
    veins += [solids.mirror(v) for v in veins]
    p.put("pulmonary_vein", solids.union(*veins), "venous")
    for name, tissue, radius, points in VESSELS:
        if name in PAIRED:
            p.pair(name, partial(p.vessel, points, radius, sd=1.5), tissue)
        else:
            p.put(name, p.vessel(points, radius, sd=1.5), tissue)
