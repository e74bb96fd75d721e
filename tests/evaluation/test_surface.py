import numpy as np
import pytest

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
