"""Implicit solids in millimetres: a distance function, negative inside, and a box."""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike

Array = np.ndarray
Point = ArrayLike  # (x, y, z)
Distance = Callable[[Array, Array, Array], Array]


class Solid(NamedTuple):
    """Signed distance in mm at (x, y, z), and the box [low, high] that holds it.

    A solid with `parts` is their union; drawing goes part by part, each in its box.
    """

    distance: Distance
    low: Array
    high: Array
    parts: tuple["Solid", ...] = ()


def ellipsoid(centre: Point, radii: Point, *, turn: Point = (0, 0, 0)) -> Solid:
    """Ellipsoid; `turn` are angles in degrees about its x, y and z axes."""
    centre, radii = np.asarray(centre, float), np.asarray(radii, float)
    axes = rotation(turn)

    def distance(x, y, z):
        p = _into(x, y, z, centre, axes)
        unit = np.sqrt(sum((q / r) ** 2 for q, r in zip(p, radii, strict=True)))
        slope = np.sqrt(sum((q / r**2) ** 2 for q, r in zip(p, radii, strict=True)))
        return _to_surface(unit, slope, radii.min())

    reach = np.sqrt(((axes * radii) ** 2).sum(axis=1))
    return Solid(distance, centre - reach, centre + reach)


def slab(
    centre: Point, half: Point, *, turn: Point = (0, 0, 0), round: float = 2.0
) -> Solid:
    """Box with rounded edges; `half` are its half sides."""
    centre, half = np.asarray(centre, float), np.asarray(half, float)
    axes = rotation(turn)

    def distance(x, y, z):
        p = _into(x, y, z, centre, axes)
        d = [np.abs(q) - (h - round) for q, h in zip(p, half, strict=True)]
        outside = np.sqrt(sum(np.maximum(q, 0) ** 2 for q in d))
        inside = np.minimum(np.maximum(np.maximum(d[0], d[1]), d[2]), 0)
        return outside + inside - round

    reach = np.abs(axes) @ half
    return Solid(distance, centre - reach, centre + reach)


def tube(points: ArrayLike, radii: ArrayLike) -> Solid:
    """Round tube along a polyline, with one radius for all points or one for each."""
    points = np.asarray(points, float)
    radii = np.broadcast_to(np.asarray(radii, float), len(points))
    ends = zip(points[:-1], points[1:], radii[:-1], radii[1:], strict=True)
    return union(*(_capsule(*end) for end in ends))


def stack(rows: ArrayLike, *, shrink: float = 0.0) -> Solid:
    """Solid of elliptic sections: rows of (height, centre x, centre y, width, depth).

    Heights grow. Width and depth are half axes, less `shrink`; between the heights all
    four are interpolated.
    """
    rows = np.asarray(rows, float)
    z, sections = rows[:, 0], rows[:, 1:]

    def distance(x, y, height):
        cx, cy, w, d = (np.interp(height, z, c).astype(np.float32) for c in sections.T)
        w, d = np.maximum(w - shrink, 1), np.maximum(d - shrink, 1)
        u, v = (x - cx) / w, (y - cy) / d
        unit = np.sqrt(u * u + v * v)
        slope = np.sqrt((u / w) ** 2 + (v / d) ** 2)
        side = _to_surface(unit, slope, np.minimum(w, d))
        return np.maximum(side, np.maximum(height - z[-1], z[0] - height))

    reach = sections[:, 2:].max(0)
    low, high = (sections[:, :2] - reach).min(0), (sections[:, :2] + reach).max(0)
    return Solid(distance, np.array([*low, z[0]]), np.array([*high, z[-1]]))


def half_space(point: Point, normal: Point) -> Solid:
    """Everything on the side of `point` away from `normal`."""
    point = np.asarray(point, float)
    normal = np.asarray(normal, float) / np.linalg.norm(normal)

    def distance(x, y, z):
        nx, ny, nz = normal
        return (x - point[0]) * nx + (y - point[1]) * ny + (z - point[2]) * nz

    return Solid(distance, np.full(3, -np.inf), np.full(3, np.inf))


def union(*solids: Solid) -> Solid:
    """Points in any of the solids."""

    def distance(x, y, z):
        return np.minimum.reduce([s.distance(x, y, z) for s in solids])

    low = np.min([s.low for s in solids], axis=0)
    return Solid(distance, low, np.max([s.high for s in solids], axis=0), solids)


def intersection(*solids: Solid) -> Solid:
    """Points in all of the solids."""

    def distance(x, y, z):
        return np.maximum.reduce([s.distance(x, y, z) for s in solids])

    low = np.max([s.low for s in solids], axis=0)
    return Solid(distance, low, np.min([s.high for s in solids], axis=0))


def difference(solid: Solid, *others: Solid) -> Solid:
    """Points in the first solid and in none of the others."""

    def distance(x, y, z):
        cut = [-other.distance(x, y, z) for other in others]
        return np.maximum.reduce([solid.distance(x, y, z), *cut])

    return Solid(distance, solid.low, solid.high)


def inset(solid: Solid, depth: float) -> Solid:
    """Points deeper than `depth` mm under the surface."""
    deep = np.float32(depth)
    return _derived(solid, lambda distance, x, y, z: distance(x, y, z) + deep)


def mirror(solid: Solid) -> Solid:
    """The same solid on the other side of the plane x = 0."""

    def box(low, high):
        return np.array([-high[0], *low[1:]]), np.array([-low[0], *high[1:]])

    return _derived(solid, lambda distance, x, y, z: distance(-x, y, z), box)


def shift(solid: Solid, offset: Point) -> Solid:
    """The same solid moved by `offset`."""
    dx, dy, dz = np.asarray(offset, np.float32)
    return _derived(
        solid,
        lambda distance, x, y, z: distance(x - dx, y - dy, z - dz),
        lambda low, high: (low + offset, high + offset),
    )


def _derived(solid, distance, box=lambda low, high: (low, high)) -> Solid:
    """Change the distance and the box of a solid and of each of its parts."""
    parts = tuple(_derived(part, distance, box) for part in solid.parts)
    low, high = box(solid.low, solid.high)
    return Solid(partial(distance, solid.distance), low, high, parts)


def rotation(degrees: Point) -> Array:
    """Rotation matrix [3, 3] about x, then y, then z."""
    radians = np.radians(degrees)
    (cx, cy, cz), (sx, sy, sz) = np.cos(radians), np.sin(radians)
    about_x = np.array([[1, 0, 0], [0, cx, -sx], [0, sx, cx]])
    about_y = np.array([[cy, 0, sy], [0, 1, 0], [-sy, 0, cy]])
    return np.array([[cz, -sz, 0], [sz, cz, 0], [0, 0, 1]]) @ about_y @ about_x


def spline(points: ArrayLike, *, steps: int = 4) -> Array:
    """Smooth curve (Catmull-Rom) through points, as a denser polyline."""
    p = np.asarray(points, float)
    p = np.concatenate([[2 * p[0] - p[1]], p, [2 * p[-1] - p[-2]]])
    t = np.arange(steps)[:, None] / steps
    parts = [
        b
        + 0.5
        * t
        * (c - a + t * (2 * a - 5 * b + 4 * c - d + t * (3 * (b - c) + d - a)))
        for a, b, c, d in zip(p[:-3], p[1:-2], p[2:-1], p[3:], strict=True)
    ]
    return np.concatenate([*parts, p[-2:-1]])


def _to_surface(unit: Array, slope: Array, least: Array | float) -> Array:
    """Distance to an ellipsoid from |p / r| and |p / r^2|; -`least` at its centre."""
    with_centre = unit * (unit - 1) / np.maximum(slope, 1e-9)
    return np.where(unit < 1e-3, -least, with_centre).astype(np.float32)


def _into(x: Array, y: Array, z: Array, centre: Array, axes: Array) -> list[Array]:
    """Coordinates along the columns of `axes`, from `centre`."""
    x, y, z = (q - np.float32(c) for q, c in zip((x, y, z), centre, strict=True))
    if np.array_equal(axes, np.eye(3)):
        return [x, y, z]
    a = axes.astype(np.float32)
    return [x * a[0, i] + y * a[1, i] + z * a[2, i] for i in range(3)]


def _capsule(a: Array, b: Array, ra: float, rb: float) -> Solid:
    """Segment a-b with the radius interpolated along it."""
    ab = (b - a).astype(np.float32)
    square = np.float32(max(float(ab @ ab), 1e-6))
    start, widening = np.float32(ra), np.float32(rb - ra)

    def distance(x, y, z):
        px, py, pz = (q - np.float32(c) for q, c in zip((x, y, z), a, strict=True))
        t = np.clip((px * ab[0] + py * ab[1] + pz * ab[2]) / square, 0, 1)
        px, py, pz = px - t * ab[0], py - t * ab[1], pz - t * ab[2]
        return np.sqrt(px * px + py * py + pz * pz) - (start + t * widening)

    return Solid(distance, np.minimum(a - ra, b - rb), np.maximum(a + ra, b + rb))
