import numpy as np
import pytest

from swinsmt_jax.phantoms import solids
from swinsmt_jax.phantoms.canvas import Canvas

SIDE = 48


def canvas(voxel=1.0, margin=0.0):
    flat = np.indices((SIDE,) * 3).astype(np.float32) * np.float32(voxel)
    flat -= np.float32(SIDE * voxel / 2)
    return Canvas(flat, origin=[-SIDE * voxel / 2] * 3, step=[voxel] * 3, margin=margin)


def drawn(solid, **keywords):
    c = canvas(**keywords)
    c.draw(solid, 1000.0, 1)
    return c


VOLUMES = {
    "sphere": (solids.ellipsoid((1, 2, 3), (12, 12, 12)), 4 / 3 * np.pi * 12**3),
    "ellipsoid": (
        solids.ellipsoid((0, 1, 0), (15, 9, 6), turn=(20, 40, 60)),
        4 / 3 * np.pi * 15 * 9 * 6,
    ),
    "tube": (
        solids.tube([(-12, 0, 0), (0, 0, 0), (12, 0, 0)], 6),
        np.pi * 36 * 24 + 4 / 3 * np.pi * 216,
    ),
    "slab": (
        solids.slab((0, 1, 0), (8, 6, 10), turn=(10, 20, 30), round=0.01),
        16 * 12 * 20,
    ),
    "stack": (solids.stack([(z, 0, 1, 8, 5) for z in (-10, 10)]), np.pi * 40 * 20),
}


@pytest.mark.parametrize("name", VOLUMES)
def test_solids_have_their_volume_in_labels_and_in_hu(name):
    solid, volume = VOLUMES[name]
    c = drawn(solid)
    assert int(c.labels.sum()) == pytest.approx(volume, rel=0.06)
    share = (c.hu + 1000) / 2000  # partial volume keeps the mass
    assert share.sum() == pytest.approx(volume, rel=0.06)
    assert share.min() >= 0
    assert share.max() <= 1
    partial = (share > 0.01) & (share < 0.99)
    assert 0 < partial.sum() < volume


@pytest.mark.parametrize("name", VOLUMES)
def test_bounding_boxes_hold_their_solids(name):
    solid, _ = VOLUMES[name]
    everywhere = solid.distance(*canvas().places) <= 0
    np.testing.assert_array_equal(drawn(solid).labels > 0, everywhere)


def test_mirror_shift_and_inset_act_as_named():
    solid = solids.union(
        solids.ellipsoid((8, 0, 0), (5, 6, 7)), solids.tube([(4, 0, 0), (9, 9, 9)], 3)
    )
    x, y, z = canvas().places
    distance = solid.distance(x, y, z)
    mirrored = solids.mirror(solid)
    np.testing.assert_array_equal(mirrored.distance(-x, y, z), distance)
    np.testing.assert_array_equal(
        drawn(mirrored).labels[1:], drawn(solid).labels[:0:-1]
    )
    np.testing.assert_array_equal(
        drawn(solids.shift(solid, (2, -3, 4))).labels[2:, :-3, 4:],
        drawn(solid).labels[:-2, 3:, :-4],
    )
    np.testing.assert_array_equal(
        drawn(solids.inset(solid, 2)).labels > 0, distance <= -2
    )


def test_sets_of_solids_combine():
    a = solids.ellipsoid((-3, 0, 0), (9, 9, 9))
    b = solids.ellipsoid((4.3, 0, 0), (8, 8, 8))
    in_a, in_b = drawn(a).labels > 0, drawn(b).labels > 0
    for build, expected in (
        (solids.union, in_a | in_b),
        (solids.intersection, in_a & in_b),
        (solids.difference, in_a & ~in_b),
    ):
        np.testing.assert_array_equal(drawn(build(a, b)).labels > 0, expected)
    half = solids.intersection(a, solids.half_space((0, 0, 0), (0, 0, 2)))
    z = canvas().places[2]
    np.testing.assert_array_equal(drawn(half).labels > 0, in_a & (z <= 0))


def test_thin_tubes_leave_an_unbroken_trace(rng):
    for _ in range(20):
        a, b = rng.uniform(-18, 18, (2, 3))
        labels = drawn(solids.tube([a, b], 0.87)).labels
        assert labels.sum() >= np.abs(b - a).max() - 1


def test_spline_passes_through_its_points():
    points = np.array([(0, 0, 0), (3, 4, 5), (9, 2, 1), (4, 4, 4)], float)
    curve = solids.spline(points, steps=4)
    np.testing.assert_allclose(curve[::4], points)
    assert len(curve) == 13


def test_deformed_places_move_the_drawing():
    c = canvas(margin=4.0)
    c.places = c.places - np.float32([3, 0, 0]).reshape(3, 1, 1, 1)
    solid = solids.ellipsoid((0, 0, 0), (7, 7, 7))
    c.draw(solid, 0.0, 5)
    np.testing.assert_array_equal(c.labels[3:] > 0, drawn(solid).labels[:-3] > 0)
    c.draw(solid, 0.0, 0)
    assert not c.labels.any()
    c.draw(solids.ellipsoid((900, 0, 0), (7, 7, 7)), 0.0, 5)
    assert not c.labels.any()
