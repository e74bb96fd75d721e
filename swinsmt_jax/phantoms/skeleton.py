"""Bones and muscles. One form serves all vertebrae, one all ribs, and each pair."""

from functools import partial

import numpy as np

from swinsmt_jax.phantoms import solids
from swinsmt_jax.phantoms.frame import (
    RIB_END,
    RIB_FALL,
    RIB_FRONT,
    RIB_WIDTH,
    VERTEBRAE,
    Painter,
    spine_y,
)
from swinsmt_jax.phantoms.solids import Solid

# fmt: off
# Of the muscles along the spine: height, distance behind it, half width, half depth.
AUTOCHTHON = np.array([
    (-45, 42, 14, 12), (0, 48, 26, 18), (60, 52, 33, 22), (120, 50, 32, 21),
    (200, 46, 27, 17), (280, 42, 24, 14), (360, 40, 22, 13), (430, 36, 22, 15),
    (480, 32, 20, 15), (545, 28, 15, 12),
])
PSOAS = [
    (30, -8, 145), (44, 5, 70), (58, 15, 0), (78, 28, -60), (92, 22, -115),
    (98, -5, -155),
]
GLUTEI = {  # centre, radii, turn, and how far it moves
    "maximus": ((88, -60, -85), (66, 22, 70), (12, 0, 18), 4),
    "medius": ((128, -10, -38), (18, 52, 62), (0, 10, -25), 4),
    "minimus": ((117, 8, -58), (11, 36, 42), (0, 10, -25), 2),
}
ARM_UP = [(172, -18, 425), (180, -14, 490), (176, -6, 580), (162, 4, 670)]
ARM_DOWN = [(175, -20, 410), (190, -22, 360), (193, -22, 260), (198, -12, 135)]
# fmt: on


def draw_muscles(p: Painter) -> None:
    """Draw the muscles of back, hip and buttocks."""

    def autochthon() -> Solid:
        z, behind, width, depth = AUTOCHTHON.T
        y = np.array([spine_y(height) for height in z]) - behind
        w, d = p.wide(width * p.size()), p.wide(depth * p.size())
        return solids.stack(np.stack([z, width + 3, y, w, d], axis=1))

    def iliopsoas() -> Solid:
        psoas = p.vessel(PSOAS, [8, 20, 23, 21, 16, 10])
        return solids.union(psoas, p.blob((92, 8, -25), (15, 40, 42), (0, 0, -36)))

    p.pair("autochthon", autochthon, "muscle")
    p.pair("iliopsoas", iliopsoas, "muscle")
    for name, (centre, radii, turn, sd) in GLUTEI.items():
        build = partial(p.blob, centre, radii, turn, sd=sd)
        p.pair(f"gluteus_{name}", build, "muscle")


def draw_spine(p: Painter) -> None:
    """Draw discs, vertebrae, sacrum and the cord in its canal."""
    heights = [-5, *VERTEBRAE.values()]
    discs = [(z, 0, spine_y(z), *(0.92 * s for s in _body(z))) for z in heights]
    p.fill(solids.stack(discs), "disc", erase=True)
    p.bone("sacrum", _sacrum(p))
    s1 = solids.ellipsoid((0, -28, -12), p.wide((32, 19, 17)), turn=p.turn(-30))
    wings = solids.ellipsoid((0, -40, -12), p.wide((34, 14, 12)), turn=p.turn(-30))
    p.bone("vertebrae_S1", solids.union(s1, wings))
    steps = np.diff(list(VERTEBRAE.values()))
    for (name, z), step in zip(VERTEBRAE.items(), [*steps, steps[-1]], strict=True):
        p.bone(f"vertebrae_{name}", _vertebra(p, z, 0.88 * step))
    canal = [(0, spine_y(z) - _body(z)[1] - 11, z) for z in (-10, *heights[1:], 580)]
    p.put("spinal_cord", solids.tube(canal, p.wide(6.5)), "cord")


def draw_rib_cage(p: Painter) -> None:
    """Draw ribs, cartilages and sternum."""
    cartilages = []
    for flip, side in ((False, "right"), (True, "left")):
        ends = {}
        for n in range(1, 13):
            path = _rib(n) + p.move(1.5)
            fall = p.variation * p.rng.normal(0, 2)
            path[:, 2] += fall * np.linspace(0, 1, len(path))
            rib = solids.tube(path, p.wide(5.5))
            ends[n] = path[-1]
            p.bone(f"rib_{side}_{n}", solids.mirror(rib) if flip else rib, shell=4)
        for n in range(1, 11):
            cartilage = solids.tube(_cartilage(n, ends), p.wide(5.5))
            cartilages.append(solids.mirror(cartilage) if flip else cartilage)
    p.put("costal_cartilages", solids.union(*cartilages), "cartilage")
    manubrium = solids.slab((0, 53, 385), p.wide((26, 7, 24)), turn=p.turn(20))
    body = solids.slab((0, 77, 305), p.wide((17, 6, 62)), turn=p.turn(16))
    xiphoid = solids.tube([(0, 94, 245), (0, 98, 225)], p.wide(6))
    p.bone("sternum", solids.union(manubrium, body, xiphoid))


def draw_shoulders(p: Painter, *, arms_up: bool) -> None:
    """Draw shoulder blades, collar bones and upper arms."""

    def scapula() -> Solid:
        shape = p.wide((44, 5, 70))
        plate = solids.ellipsoid(p.move(3) + (106, -74, 352), shape, turn=p.turn(z=28))
        spine = [(72, -98, 392), (115, -88, 420), (150, -45, 445)]
        neck = solids.tube([(132, -52, 405), (146, -32, 414)], p.wide((9, 13)))
        return solids.union(plate, solids.tube(spine, p.wide((5, 6, 8))), neck)

    def clavicula() -> Solid:
        points = [(20, 48, 408), (60, 46, 424), (108, 8, 438), (148, -22, 442)]
        return p.vessel(points, [9, 6.5, 6.5, 7])

    def humerus() -> Solid:
        shaft = ARM_UP if arms_up else ARM_DOWN
        head = solids.ellipsoid((168, -22, 416), p.wide((24, 24, 24)))
        return solids.union(head, p.vessel(shaft, [18, 13, 12, 14], sd=3))

    p.bone_pair("scapula", scapula)
    p.bone_pair("clavicula", clavicula)
    p.bone_pair("humerus", humerus)


def draw_pelvis(p: Painter) -> None:
    """Draw hip bones and thigh bones."""

    def hip() -> Solid:
        plate = p.wide((10, 62, 58))
        wing = solids.ellipsoid((98, -6, -18), plate, turn=p.turn(y=8, z=-36))
        socket = solids.tube([(100, 2, -70), (92, -4, -108)], p.wide((16, 26)))
        seat = [(95, -25, -120), (80, -42, -150), (55, -25, -165), (18, 30, -142)]
        pubis = [(18, 34, -140), (50, 36, -118), (88, 8, -105)]
        ischium = solids.tube(seat, p.wide((15, 16, 9, 11)))
        return solids.union(wing, socket, ischium, solids.tube(pubis, p.wide(9)))

    def femur() -> Solid:
        head = solids.ellipsoid((90, -3, -116), p.wide((23, 23, 23)))
        shaft = [(90, -3, -116), (118, -12, -128), (130, -12, -165), (122, -4, -300)]
        return solids.union(head, solids.tube(shaft, p.wide((14, 16, 17, 13))))

    p.bone_pair("hip", hip)
    p.bone_pair("femur", femur)


def draw_head(p: Painter) -> None:
    """Draw skull and brain."""
    vault = solids.ellipsoid((0, 18, 643), np.array([72, 93, 84]) * p.size(0.03))
    vault = solids.intersection(vault, solids.half_space((0, 0, 577), (0, 0.15, -1)))
    brain = solids.inset(vault, 8)
    face = solids.ellipsoid((0, 78, 592), (44, 36, 38))
    chin = [(58, 28, 585), (54, 40, 545), (34, 84, 532), (0, 100, 530)]
    jaw = solids.tube(solids.spline(chin), p.wide(8))
    p.bone("skull", solids.union(vault, face, jaw, solids.mirror(jaw)), shell=5)
    p.put("brain", brain, "brain")
    p.fill(solids.ellipsoid((0, 85, 592), (24, 24, 26)), "gas", erase=True)
    throat = [(0, 68, 575), (0, 40, 550), (0, 38, 505), (0, 24, 480)]
    p.fill(solids.tube(throat, p.wide(8)), "gas", erase=True)


def _body(z: float) -> tuple[float, float]:
    """Half width and half depth of the vertebral body at height z."""
    heights = [0, 148, 180, 300, 446, 500, 561]
    width = np.interp(z, heights, [27, 24, 21, 17, 16, 13, 15])
    return float(width), float(np.interp(z, heights, [18, 17, 16, 15, 12, 10, 9]))


def _vertebra(p: Painter, z: float, height: float) -> Solid:
    w, d = _body(z)
    y = spine_y(z)
    back = y - d
    half = max(height / 2, p.thinnest)
    body = solids.stack([(z - half, 0, y, w, d), (z + half, 0, y, w, d)])
    r = p.wide(min(5.5, height / 3))
    arch = [(0.75 * w, back + 3, z + 2), (0.8 * w, back - 14, z)]
    lamina = solids.tube([*arch, (0, back - 25, z - 4)], r)
    side = [(0.75 * w, back - 6, z + 2), (w + 16, back - 12, z + 2)]
    process = solids.tube(side, r)
    thorn = solids.tube([(0, back - 24, z - 4), (0, back - 38, z - 12)], r)
    sides = [lamina, process, solids.mirror(lamina), solids.mirror(process)]
    return solids.union(body, *sides, thorn)


def _sacrum(p: Painter) -> Solid:
    upper = solids.ellipsoid((0, -55, -35), p.wide((58, 17, 46)), turn=p.turn(-35))
    lower = [(0, -72, -60), (0, -84, -90), (0, -72, -118)]
    return solids.union(upper, solids.tube(lower, p.wide((24, 15, 9))))


def _rib(n: int) -> np.ndarray:
    """Points [m, 3] along right rib n, from the spine to its front end."""
    z = VERTEBRAE[f"T{n}"]
    width, front, fall = RIB_WIDTH[n - 1], RIB_FRONT[n - 1], RIB_FALL[n - 1]
    back = spine_y(z) - 44
    angle = np.radians(np.linspace(14, RIB_END[n - 1], 12))
    share = np.linspace(0, 1, 12)
    x = width * np.sin(angle)
    y = (front + back) / 2 - (front - back) / 2 * np.cos(angle)
    arc = np.stack([x, y, z + 6 - fall * share**1.15], axis=1)
    return np.concatenate([[(16, spine_y(z) - 14, z + 8)], arc])


def _cartilage(n: int, ends: dict[int, np.ndarray]) -> np.ndarray:
    """Points along the cartilage from rib n to the sternum, or to the one above."""
    start = np.asarray(ends[n])
    heights = {1: 398, 2: 368, 3: 340, 4: 314, 5: 290, 6: 268, 7: 250}
    if n <= 7:
        z = heights[n]
        y = np.interp(z, [250, 300, 360, 400], [95, 80, 62, 48])
        end = np.array([18.0, y, z])
        low = min(start[2], z)
        middle = (0.6 * start[0] + 0.4 * end[0], max(start[1], y) + 4, 0.5 * (low + z))
        return np.array([start, middle, end])
    above = ends[n - 1] + np.array([-14.0, 10.0, 4.0])
    return np.array([start, (start + above) / 2 + (0, 5, -4), above])
