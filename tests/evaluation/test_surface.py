import itertools

import numpy as np
import pytest
import surface_distance
from surface_distance import lookup_tables

from swinsmt_jax.checks import UserError
from swinsmt_jax.evaluation.surface import surface_dice


def box(*sides, start=(5, 5, 5), shape=(30, 30, 40)):
    label = np.zeros(shape, np.uint8)
    label[tuple(slice(a, a + n) for a, n in zip(start, sides, strict=True))] = 1
    return label


def test_surfaces_within_the_tolerance_are_the_same():
    truth, moved = box(10, 10, 10), box(10, 10, 10, start=(5, 5, 7))
    options = dict(spacing=(1.0, 1.0, 1.5), num_classes=2)
    assert surface_dice(moved, truth, tolerance=3.0, **options)[1] == 1
    assert surface_dice(moved, truth, tolerance=2.9, **options)[1] < 0.9


def test_the_share_of_a_face_that_is_too_far():
    """A box of 20 x 20 x 10 and one that is 20 longer: all but the far end agree."""
    truth, longer = box(20, 20, 10), box(20, 20, 30)
    found = surface_dice(
        longer, truth, spacing=(1, 1, 1), num_classes=2, tolerance=2.0
    )[1]
    own, other = 2 * 400 + 4 * 200, 2 * 400 + 4 * 600
    # The face at 10 lies inside the longer box, up to 2 mm from its sides.
    inside = (20 - 2 * 2) ** 2
    expected = (own - inside + 400 + 4 * 20 * 12) / (own + other)
    assert found == pytest.approx(expected, abs=0.03)


def test_absent_missed_and_invented_classes():
    truth = box(8, 8, 8)
    truth[20:24, 20:24, 20:24] = 2
    prediction = box(8, 8, 8)
    prediction[20:24, 2:6, 20:24] = 3
    found = surface_dice(prediction, truth, spacing=(1.5,) * 3, num_classes=5)
    np.testing.assert_array_equal(found, [np.nan, 1, 0, np.nan, np.nan])


def test_a_system_that_tells_no_cores_of_a_process_scores_all_the_same(monkeypatch):
    """As on macOS."""
    monkeypatch.delattr("os.sched_getaffinity", raising=False)
    truth = box(8, 8, 8)
    assert surface_dice(truth, truth, spacing=(1, 1, 1), num_classes=2)[1] == 1


def test_workers_change_nothing(rng):
    truth, prediction = rng.integers(0, 6, (2, 12, 10, 8)).astype(np.uint8)
    options = dict(spacing=(1, 2, 3), num_classes=6, tolerance=1.5)
    one = surface_dice(prediction, truth, workers=1, **options)
    np.testing.assert_array_equal(
        one, surface_dice(prediction, truth, workers=4, **options)
    )
    assert (one[1:] > 0).all() and (one[1:] < 1).all()


@pytest.mark.parametrize(
    "change, words",
    [
        ({"tolerance": 0}, "tolerance is 0 mm"),
        ({"spacing": (1, 0, 1)}, r"spacing \(1, 0, 1\)"),
        ({"prediction": np.zeros((3, 3), int)}, r"shape \(3, 3\)"),
    ],
)
def test_bad_arguments_are_refused(change, words):
    options = {"prediction": box(2, 2, 2), "spacing": (1, 1, 1)} | change
    with pytest.raises(UserError, match=words):
        surface_dice(options.pop("prediction"), box(2, 2, 2), num_classes=2, **options)


@pytest.mark.parametrize("side, apart", [(0.6, 5), (0.3, 10), (0.75, 4)])
def test_a_spacing_rounded_in_a_header_is_within_the_tolerance(side, apart):
    truth, prediction = np.zeros((2, 30, 12, 12), np.uint8)
    truth[2:10, 2:10, 2:10] = prediction[2 + apart : 10 + apart, 2:10, 2:10] = 1
    spacing = (float(np.float32(side)),) * 3
    options = {"num_classes": 2, "spacing": spacing}
    assert surface_dice(prediction, truth, **options, tolerance=3.0)[1] == 1
    assert surface_dice(prediction, truth, **options, tolerance=2.999)[1] < 1


def surface_elements(mask, spacing):
    """Places [n, 3] in mm and areas [n] of a mask's surface, corner by corner."""
    areas = lookup_tables.create_table_neighbour_code_to_surface_area(spacing)
    padded, found = np.pad(mask, 1), []
    for corner in np.ndindex(*(n - 1 for n in padded.shape)):
        cells = itertools.product((0, 1), repeat=3)
        code = 0
        for cell in cells:
            code = 2 * code + int(padded[tuple(np.add(corner, cell))])
        if code not in (0, 255):
            found.append((*np.multiply(corner, spacing), areas[code]))
    found = np.array(found)
    return found[:, :3], found[:, 3]


@pytest.mark.parametrize("spacing, tolerance", [((1, 1, 1), 1.0), ((2, 1, 3), 2.5)])
def test_a_count_over_all_pairs_of_surface_elements_agrees(rng, spacing, tolerance):
    truth, prediction = (rng.random((2, 6, 7, 5)) < 0.3).astype(np.uint8)
    (a, area_a), (b, area_b) = (
        surface_elements(x, spacing) for x in (truth, prediction)
    )
    far = np.linalg.norm(a[:, None] - b[None], axis=-1) > tolerance
    missed = area_a[far.all(axis=1)].sum() + area_b[far.all(axis=0)].sum()
    expected = 1 - missed / (area_a.sum() + area_b.sum())
    options = dict(spacing=spacing, num_classes=2, tolerance=tolerance)
    found = surface_dice(prediction, truth, **options)[1]
    assert found == pytest.approx(expected, abs=1e-9) and 0 < found < 1


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_cropping_to_structures_changes_nothing(rng):
    """DeepMind's package on whole volumes, class by class."""
    truth = rng.integers(0, 5, (14, 12, 10)).astype(np.uint8)
    prediction = np.where(rng.random(truth.shape) < 0.6, truth, 0).astype(np.uint8)
    truth[:9][truth[:9] == 4] = 0
    spacing = (1.5, 1.0, 2.0)
    found = surface_dice(
        prediction, truth, spacing=spacing, num_classes=5, tolerance=1.2
    )
    for k in range(1, 5):
        distances = surface_distance.compute_surface_distances(
            truth == k, prediction == k, spacing
        )
        expected = surface_distance.compute_surface_dice_at_tolerance(distances, 1.2)
        assert found[k] == pytest.approx(expected, abs=1e-12)
