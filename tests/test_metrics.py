import numpy as np
import pytest

from swinsmt_jax.checks import UserError
from swinsmt_jax.evaluation import metrics
from swinsmt_jax.evaluation.metrics import Counts

NAN = np.nan


def test_counts_equal_a_loop_over_classes(rng, monkeypatch):
    monkeypatch.setattr(metrics, "CHUNK", 50)  # several chunks, the last one short
    prediction = rng.integers(0, 6, (5, 6, 7)).astype(np.uint8)
    truth = rng.integers(0, 6, (5, 6, 7)).astype(np.int32)
    counts = metrics.overlap_counts(prediction, truth, num_classes=7)
    for k in range(7):
        p, t = prediction == k, truth == k
        assert counts.intersection[k] == (p & t).sum()
        assert counts.predicted[k] == p.sum()
        assert counts.truth[k] == t.sum()


def test_every_voxel_is_counted_once(rng):
    labels = rng.integers(0, 118, (9, 8, 7)).astype(np.uint8)
    counts = metrics.overlap_counts(labels, labels[::-1], num_classes=118)
    assert counts.predicted.sum() == counts.truth.sum() == labels.size
    assert (counts.intersection <= np.minimum(counts.predicted, counts.truth)).all()


def test_dice_of_a_label_map_with_itself_is_one(rng):
    labels = rng.integers(0, 5, (4, 4, 4))
    score = metrics.dice(metrics.overlap_counts(labels, labels, num_classes=5))
    assert (score == 1).all() and score.dtype == np.float64


def test_dice_is_symmetric_where_both_maps_have_the_class(rng):
    a, b = rng.integers(0, 5, (2, 4, 4, 4))
    forth = metrics.dice(metrics.overlap_counts(a, b, num_classes=5))
    back = metrics.dice(metrics.overlap_counts(b, a, num_classes=5))
    np.testing.assert_array_equal(forth, back)


def test_absent_missed_and_invented_classes():
    #         background 0, found 1, missed 2, absent 3, invented 4
    truth = np.array([0, 0, 1, 1, 2, 2])
    prediction = np.array([0, 4, 1, 0, 0, 0])
    counts = metrics.overlap_counts(prediction, truth, num_classes=5)
    np.testing.assert_allclose(metrics.dice(counts), [2 / 6, 2 / 3, 0, NAN, NAN])
    assert metrics.false_positive_classes(counts).tolist() == [0, 0, 0, 0, 1]


def test_the_background_is_never_a_false_positive():
    counts = metrics.overlap_counts(np.array([0, 1]), np.array([1, 1]), num_classes=2)
    assert not metrics.false_positive_classes(counts).any()


def test_the_three_averages_by_hand():
    #  background  a     b     c
    scores = np.array([[0.9, 1.0, 0.5, NAN], [0.9, 0.0, NAN, NAN]])
    result = metrics.averages(scores)
    assert tuple(result) == metrics.AVERAGES
    assert result["over_classes"] == pytest.approx((0.5 + 0.5) / 2)
    assert result["over_cases"] == pytest.approx((0.75 + 0.0) / 2)
    assert result["over_pairs"] == pytest.approx(1.5 / 3)


def test_averages_agree_when_nothing_is_absent(rng):
    result = metrics.averages(rng.random((4, 9)))
    assert max(result.values()) - min(result.values()) < 1e-12


def test_the_background_is_left_out(rng):
    scores = rng.random((3, 5))
    without = metrics.averages(scores)
    scores[:, 0] = 0
    assert metrics.averages(scores) == without


def test_nothing_present_is_nan_without_a_warning():
    result = metrics.averages(np.full((2, 4), NAN))
    assert all(np.isnan(v) for v in result.values())


def test_group_averages_choose_their_classes():
    scores = np.array([[1.0, 0.2, 0.4, 0.9]])
    result = metrics.group_averages(scores, groups={"x": (1, 2), "y": (3,)})
    assert list(result) == ["x", "y", "overall"]
    assert result["x"]["over_classes"] == pytest.approx(0.3)
    assert result["y"]["over_pairs"] == pytest.approx(0.9)
    assert result["overall"]["over_cases"] == pytest.approx(0.5)


def test_class_means_leave_out_absent_cases():
    scores = np.array([[1.0, 0.2, NAN], [0.0, NAN, NAN]])
    np.testing.assert_allclose(metrics.class_means(scores), [0.5, 0.2, NAN])


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
        metrics.overlap_counts(prediction, truth, num_classes=3)


def test_refuses_scores_of_one_case_alone_and_unknown_classes():
    with pytest.raises(UserError, match=r"\[cases, classes\]"):
        metrics.averages(np.zeros(4))
    with pytest.raises(UserError, match="class id to average is 9"):
        metrics.averages(np.zeros((1, 4)), classes=[9])


def test_no_predicted_voxel_of_a_present_class_is_zero():
    counts = Counts(np.array([0]), np.array([0]), np.array([7]))
    assert metrics.dice(counts).tolist() == [0.0]


@pytest.mark.parametrize("rule", metrics.AVERAGES)
def test_bootstrap_intervals_are_quantiles_over_redrawn_cases(rng, rule):
    scores = rng.random((6, 5))
    scores[rng.random((6, 5)) < 0.2] = NAN
    groups = {"x": (1, 2)}
    found = metrics.bootstrap_intervals(scores, groups=groups, rule=rule)
    means = []
    for _ in range(2000):
        drawn = scores[rng.integers(6, size=6)]
        means.append(metrics.group_averages(drawn, groups=groups)["overall"][rule])
    expected = np.nanquantile(means, (0.025, 0.975))
    np.testing.assert_allclose(found["overall"], expected, atol=0.02)
    assert list(found) == ["x", "overall"] and found["x"][0] < found["x"][1]


def test_one_case_has_no_interval():
    found = metrics.bootstrap_intervals(np.ones((1, 3)), groups={}, rule="over_pairs")
    assert np.isnan(found["overall"]).all()
