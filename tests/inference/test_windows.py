import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from swinsmt_jax.checks import UserError
from swinsmt_jax.inference import windows as geometry


@pytest.mark.parametrize(
    "length, window, overlap, expected",
    [
        (45, 32, 0.5, [0, 13]),  # the last one is moved back
        (70, 32, 0.5, [0, 16, 32, 38]),
        (64, 32, 0.5, [0, 16, 32]),
        (32, 32, 0.5, [0]),
        (96, 32, 0.0, [0, 32, 64]),
        (12, 10, 0.99, [0, 1, 2]),  # never less than one voxel apart
        (20, 10, 0.25, [0, 7, 10]),  # int(10 * 0.75)
    ],
)
def test_starts_of_one_axis(length, window, overlap, expected):
    starts = geometry.window_starts((length,), (window,), overlap=overlap)
    assert [s for (s,) in starts] == expected


@pytest.mark.parametrize(
    "length, window, overlap, number",
    [(60, 20, 0.9, 21), (320, 160, 0.9, 11), (160, 40, 0.8, 16), (96, 32, 0.5, 5)],
)
def test_a_decimal_overlap_gives_no_extra_windows(length, window, overlap, number):
    starts = geometry.window_starts((length,), (window,), overlap=overlap)
    assert len(starts) == number


@settings(max_examples=50, deadline=None)
@given(
    window=st.tuples(*[st.integers(1, 6)] * 3),
    more=st.tuples(*[st.integers(0, 9)] * 3),
    overlap=st.floats(0, 0.95),
)
def test_windows_cover_every_voxel_in_order(window, more, overlap):
    shape = tuple(w + m for w, m in zip(window, more, strict=True))
    covered = np.zeros(shape, int)
    starts = geometry.window_starts(shape, window, overlap=overlap)
    for start in starts:
        box = tuple(slice(s, s + w) for s, w in zip(start, window, strict=True))
        assert covered[box].shape == window
        covered[box] += 1
    assert covered.min() >= 1
    assert starts == sorted(set(starts))


@given(
    window=st.tuples(*[st.integers(1, 9)] * 3),
    shape=st.tuples(*[st.integers(1, 9)] * 3),
)
def test_padding_makes_the_window_fit_and_is_centred(window, shape):
    for n, w, (before, after) in zip(
        shape, window, geometry.padding(shape, window), strict=True
    ):
        assert n + before + after == max(n, w)
        assert 0 <= after - before <= 1


def test_constant_importance_is_one():
    assert (geometry.importance((2, 3, 4), blend="constant") == 1).all()


def test_gaussian_importance_falls_off_to_its_floor():
    weights = geometry.importance((32, 24, 16), blend="gaussian")
    assert weights.dtype == np.float32 and weights.shape == (32, 24, 16)
    assert weights.min() == np.float32(1e-3)
    for axis in range(3):
        np.testing.assert_array_equal(weights, np.flip(weights, axis))
    line = weights[:, 12, 8]
    assert (np.diff(line[:16]) >= 0).all()
    # One standard deviation, side / 8, from the centre.
    ratio = weights[19, 12, 8] / weights[16, 12, 8]
    assert ratio == pytest.approx(np.exp(-(3.5**2 - 0.5**2) / (2 * 4**2)), rel=1e-5)


def test_the_centre_of_an_odd_window_weighs_one():
    assert geometry.importance((5, 7, 9), blend="gaussian")[2, 3, 4] == 1


@pytest.mark.parametrize("overlap", [-0.1, 1.0])
def test_refuses_an_overlap_out_of_range(overlap):
    with pytest.raises(UserError, match="overlap"):
        geometry.window_starts((8,), (4,), overlap=overlap)


def test_refuses_a_window_larger_than_the_volume():
    with pytest.raises(UserError, match="pad the volume"):
        geometry.window_starts((8, 3), (4, 4), overlap=0.5)


def test_refuses_an_unknown_blend():
    with pytest.raises(UserError, match="Did you mean 'gaussian'"):
        geometry.importance((4,), blend="gausian")
