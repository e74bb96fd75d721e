import numpy as np
import pytest

from swinsmt_jax.checks import UserError
from swinsmt_jax.evaluation import averages

NAN = np.nan


def test_the_three_averages_by_hand():
    #  background  a     b     c
    scores = np.array([[0.9, 1.0, 0.5, NAN], [0.9, 0.0, NAN, NAN]])
    result = averages.averages(scores)
    assert list(result) == list(averages.AVERAGES)
    assert result["over_classes"] == pytest.approx((0.5 + 0.5) / 2)
    assert result["over_cases"] == pytest.approx((0.75 + 0.0) / 2)
    assert result["over_pairs"] == pytest.approx(1.5 / 3)


def test_averages_agree_when_nothing_is_absent(rng):
    result = averages.averages(rng.random((4, 9)))
    assert max(result.values()) - min(result.values()) < 1e-12


def test_the_background_is_left_out(rng):
    scores = rng.random((3, 5))
    without = averages.averages(scores)
    scores[:, 0] = 0
    assert averages.averages(scores) == without


def test_nothing_present_is_nan_without_a_warning():
    result = averages.averages(np.full((2, 4), NAN))
    assert all(np.isnan(v) for v in result.values())


def test_group_averages_choose_their_classes():
    scores = np.array([[1.0, 0.2, 0.4, 0.9]])
    result = averages.group_averages(scores, groups={"x": (1, 2), "y": (3,)})
    assert list(result) == ["x", "y", "overall"]
    assert result["x"]["over_classes"] == pytest.approx(0.3)
    assert result["y"]["over_pairs"] == pytest.approx(0.9)
    assert result["overall"]["over_cases"] == pytest.approx(0.5)


def test_means_leave_out_absent_cases():
    scores = np.array([[1.0, 0.2, NAN], [0.0, NAN, NAN]])
    np.testing.assert_allclose(averages.known_mean(scores, axis=0), [0.5, 0.2, NAN])


def test_refuses_scores_of_one_case_alone_and_unknown_classes():
    with pytest.raises(UserError, match=r"\[cases, classes\]"):
        averages.averages(np.zeros(4))
    with pytest.raises(UserError, match="class id to average is 9"):
        averages.averages(np.zeros((1, 4)), classes=[9])


@pytest.mark.parametrize("rule", averages.AVERAGES)
def test_bootstrap_intervals_are_quantiles_over_redrawn_cases(rng, rule):
    scores = rng.random((6, 5))
    scores[rng.random((6, 5)) < 0.2] = NAN
    groups = {"x": (1, 2)}
    found = averages.bootstrap_intervals(scores, groups=groups, rule=rule)
    means = []
    for _ in range(2000):
        drawn = scores[rng.integers(6, size=6)]
        means.append(averages.group_averages(drawn, groups=groups)["overall"][rule])
    expected = np.nanquantile(means, (0.025, 0.975))
    np.testing.assert_allclose(found["overall"], expected, atol=0.02)
    assert list(found) == ["x", "overall"] and found["x"][0] < found["x"][1]


def test_one_case_has_no_interval():
    found = averages.bootstrap_intervals(np.ones((1, 3)), groups={}, rule="over_pairs")
    assert np.isnan(found["overall"]).all()
