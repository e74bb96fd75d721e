import itertools

import jax.numpy as jnp
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from swinsmt_jax.ops import windows

sides = st.tuples(*[st.integers(1, 9)] * 3)


@settings(deadline=None, max_examples=8)
@given(grid=sides, window=sides)
def test_merge_inverts_partition(grid, window):
    padded = tuple(-(-g // w) * w for g, w in zip(grid, window, strict=True))
    x = np.arange(2 * np.prod(padded) * 3, dtype=np.float32).reshape(2, *padded, 3)
    cut = windows.partition(jnp.asarray(x), window)
    assert cut.shape == (2, np.prod(padded) // np.prod(window), np.prod(window), 3)
    np.testing.assert_array_equal(windows.merge(cut, window, padded), x)


@settings(deadline=None, max_examples=25)
@given(grid=sides, window=sides)
def test_fit_window_shrinks_and_drops_the_shift_only_where_the_grid_is_small(
    grid, window
):
    shift = tuple(w // 2 for w in window)
    fitted, moved = windows.fit_window(grid, window, shift)
    for g, w, s, f, m in zip(grid, window, shift, fitted, moved, strict=True):
        assert (f, m) == ((w, s) if g > w else (g, 0))


def test_pad_adds_zeros_at_the_end(rng):
    x = rng.standard_normal((1, 5, 7, 8, 2)).astype(np.float32)
    padded = windows.pad(jnp.asarray(x), (4, 7, 3))
    assert padded.shape == (1, 8, 7, 9, 2)
    np.testing.assert_array_equal(padded[:, :5, :7, :8], x)
    assert np.count_nonzero(padded) == x.size


@settings(deadline=None, max_examples=8)
@given(
    counts=st.tuples(*[st.integers(2, 3)] * 3),
    window=st.tuples(*[st.integers(1, 3)] * 3),
    data=st.data(),
)
def test_tokens_share_a_region_only_if_no_boundary_lies_between_them(
    counts, window, data
):
    """Two tokens of a shifted window may attend iff they were neighbours before."""
    shift = tuple(data.draw(st.integers(0, w - 1)) for w in window)
    grid = tuple(c * w for c, w in zip(counts, window, strict=True))
    regions = windows.shift_regions(grid, window, shift)
    axes = np.stack(np.meshgrid(*map(np.arange, grid), indexing="ij"), -1)
    rolled = windows.cyclic_shift(jnp.asarray(axes[None]), shift)
    home = np.asarray(windows.partition(rolled, window))[0]  # [W, n, 3]
    for where, region in zip(home, regions, strict=True):
        near = (np.abs(where[:, None] - where[None]) < window).all(-1)
        np.testing.assert_array_equal(region[:, None] == region[None], near)


def test_relative_position_index_numbers_offsets():
    window = (2, 3, 4)
    index = windows.relative_position_index(window)
    tokens = list(itertools.product(*map(range, window)))
    seen = {}
    for i, a in enumerate(tokens):
        for j, b in enumerate(tokens):
            offset = tuple(np.subtract(a, b))
            assert seen.setdefault(offset, index[i, j]) == index[i, j]
    assert sorted(seen.values()) == list(range(3 * 5 * 7))
