"""Labels resampled as nnU-Net resamples those that it trains on."""

import itertools

import numpy as np
import pytest

from swinsmt_jax.data.resampling import LABEL_RULES, resample
from swinsmt_jax.labels import IGNORED


def linear(array, spacing):
    return resample(array, np.eye(4), spacing=spacing, order=0, rule="linear")[0]


def naive(array, spacing):
    """Voxel by voxel, from the definition."""
    shape = [-(-n // spacing) for n in array.shape]  # the covering grid's
    found = np.zeros(shape, np.uint8)
    for index in itertools.product(*map(range, shape)):
        places = [
            np.clip(i * spacing + 0.5 * spacing - 0.5, 0, n - 1)
            for i, n in zip(index, array.shape, strict=True)
        ]
        shares: dict = {}
        for corner in itertools.product((0, 1), repeat=3):
            at, weight = [], 1.0
            for p, n, side in zip(places, array.shape, corner, strict=True):
                low = int(p)
                weight *= p - low if side else 1 - (p - low)
                at.append(min(low + side, n - 1))
            number = int(array[tuple(at)])
            shares[number] = shares.get(number, 0.0) + weight
        top = max(shares.values())
        tied = [number for number, share in shares.items() if share > top - 1e-6]
        near = int(array[tuple(int(np.floor(p + 0.5)) for p in places)])
        found[index] = near if near in tied else min(tied)
    return found


def test_ties_go_to_the_nearest_voxel():
    """Read from nnU-Net (batchgenerators 0.25.5): of two the one further along."""
    row = np.array([0, 2, 2, 0, 1, 3, 3, 1], np.uint8)[:, None, None]
    found = LABEL_RULES["linear"](row, (2, 1, 1), (0.5, 0, 0), (4, 1, 1))
    assert found[:, 0, 0].tolist() == [2, 0, 3, 1]


def test_four_labels_that_meet_leave_no_hole():
    square = np.array([[1, 2], [3, 4]], np.uint8)[:, :, None]
    found = LABEL_RULES["linear"](square, (2, 2, 1), (0.5, 0.5, 0), (1, 1, 1))
    assert found.item() == 4


@pytest.mark.parametrize("spacing", [1, 2, 3])
def test_it_equals_the_definition(rng, spacing):
    array = rng.choice(np.uint8([0, 1, 2, 5, IGNORED]), (7, 6, 5))
    np.testing.assert_array_equal(linear(array, float(spacing)), naive(array, spacing))
