import numpy as np
import pytest

from swinsmt_jax.checks import UserError
from swinsmt_jax.evaluation import conventions, overlap
from swinsmt_jax.evaluation.overlap import Counts

NAN = np.nan


def test_counts_equal_a_loop_over_classes(rng, monkeypatch):
    monkeypatch.setattr(overlap, "CHUNK", 50)  # several chunks, the last one short
    prediction = rng.integers(0, 6, (5, 6, 7)).astype(np.uint8)
    truth = rng.integers(0, 6, (5, 6, 7)).astype(np.int32)
    counts = overlap.overlap_counts(prediction, truth, num_classes=7)
    for k in range(7):
        p, t = prediction == k, truth == k
        assert counts.intersection[k] == (p & t).sum()
        assert counts.predicted[k] == p.sum()
        assert counts.truth[k] == t.sum()


def test_every_voxel_is_counted_once(rng):
    labels = rng.integers(0, 118, (9, 8, 7)).astype(np.uint8)
    counts = overlap.overlap_counts(labels, labels[::-1], num_classes=118)
    assert counts.predicted.sum() == counts.truth.sum() == labels.size
    assert (counts.intersection <= np.minimum(counts.predicted, counts.truth)).all()


def test_dice_of_a_label_map_with_itself_is_one(rng):
    labels = rng.integers(0, 5, (4, 4, 4))
    score = conventions.dice(overlap.overlap_counts(labels, labels, num_classes=5))
    assert (score == 1).all() and score.dtype == np.float64


def test_dice_is_symmetric_where_both_maps_have_the_class(rng):
    a, b = rng.integers(0, 5, (2, 4, 4, 4))
    forth = conventions.dice(overlap.overlap_counts(a, b, num_classes=5))
    back = conventions.dice(overlap.overlap_counts(b, a, num_classes=5))
    np.testing.assert_array_equal(forth, back)


def test_absent_missed_and_invented_classes():
    #         background 0, found 1, missed 2, absent 3, invented 4
    truth = np.array([0, 0, 1, 1, 2, 2])
    prediction = np.array([0, 4, 1, 0, 0, 0])
    counts = overlap.overlap_counts(prediction, truth, num_classes=5)
    np.testing.assert_allclose(conventions.dice(counts), [2 / 6, 2 / 3, 0, NAN, NAN])
    assert overlap.false_positive_classes(counts).tolist() == [0, 0, 0, 0, 1]


def test_the_background_is_never_a_false_positive():
    counts = overlap.overlap_counts(np.array([0, 1]), np.array([1, 1]), num_classes=2)
    assert not overlap.false_positive_classes(counts).any()


@pytest.mark.parametrize(
    "prediction, truth, words",
    [
        (np.zeros((2, 3), int), np.zeros((3, 2), int), r"\(2, 3\).*\(3, 2\)"),
        (np.zeros(3), np.zeros(3, int), "prediction has dtype float64"),
        (np.array([0, 3]), np.array([0, 1]), r"prediction holds the labels 0 to 3"),
        (np.array([0, 1]), np.array([-1, 1]), r"truth holds the labels -1 to 1"),
        (np.zeros(0, int), np.zeros(0, int), "at least one voxel"),
    ],
)
def test_refuses_bad_label_maps(prediction, truth, words):
    with pytest.raises(UserError, match=words):
        overlap.overlap_counts(prediction, truth, num_classes=3)


def test_no_predicted_voxel_of_a_present_class_is_zero():
    counts = Counts(np.array([0]), np.array([0]), np.array([7]))
    assert conventions.dice(counts).tolist() == [0.0]
