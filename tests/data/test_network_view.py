import numpy as np
import pytest

from swinsmt_jax.data import transforms
from swinsmt_jax.data.network_view import network_view, scaled

AFFINE = np.diag([3.0, 3.0, 5.0, 1.0])
AFFINE[:3, 3] = -40, 7, 11
HU_RANGE = (-1024.0, 1024.0)


@pytest.fixture
def hu(rng):
    """A scan with air on all sides of a body, and beyond the range of HU."""
    hu = np.full((20, 24, 16), -1024, np.int16)
    hu[3:18, 5:20, 2:14] = rng.integers(-1000, 3000, (15, 15, 12))
    return hu


def test_it_is_the_foreground_scaled_as_in_training(hu):
    view = network_view(hu, AFFINE, spacing=0.0, hu_range=HU_RANGE)
    assert view.box == (slice(3, 18), slice(5, 20), slice(2, 14))
    assert view.positions is None and view.shape == hu.shape
    scaled = (np.clip(hu, -1024, 1024) + 1024) / 2048
    assert view.image.dtype == np.float32
    np.testing.assert_allclose(view.image[..., 0], scaled[view.box], atol=1e-6)


def test_clipped_hu_are_normalised_by_mean_and_deviation(hu):
    """As nnU-Net's CTNormalization; what is around the scan is air too."""
    options = {"spacing": 0.0, "hu_range": (-900, 300), "normalization": (-98.3, 354.2)}
    view = network_view(hu, AFFINE, **options)
    expected = (np.clip(hu[view.box], -900, 300) + 98.3) / 354.2
    np.testing.assert_allclose(view.image[..., 0], expected, atol=2e-6)
    assert view.image.dtype == np.float32
    assert view.fill == pytest.approx((-900 + 98.3) / 354.2)


def test_a_scan_of_air_is_seen_whole():
    air = np.full((5, 6, 7), -1024, np.int16)
    view = network_view(air, AFFINE, spacing=0.0, hu_range=HU_RANGE)
    assert view.image.shape == (5, 6, 7, 1) and not view.image.any()


@pytest.mark.parametrize("spacing", [2.0, 4.5])
def test_positions_lead_back_to_the_voxels_of_the_scan(hu, spacing):
    """Of a scan whose HU rise along each axis, they interpolate to its own values."""
    for axis in range(3):
        shape = [-1 if a == axis else 1 for a in range(3)]
        ramp = np.arange(hu.shape[axis]).reshape(shape) * 40.0 - 900
        ramp = np.broadcast_to(ramp, hu.shape).astype(np.float32)
        view = network_view(ramp, AFFINE, spacing=spacing, hu_range=HU_RANGE)
        assert view.box == tuple(slice(0, n) for n in hu.shape)
        size = view.image.shape[:3]
        found = transforms.interpolate(
            view.image[..., 0],
            [p.clip(0, n - 1) for p, n in zip(view.positions, size, strict=True)],
        )
        inner = (slice(3, -3),) * 3
        expected = scaled(ramp, hu_range=HU_RANGE)
        np.testing.assert_allclose(found[inner], expected[inner], atol=1e-4)


@pytest.mark.parametrize("spacing", [2.0, 4.5])
def test_the_box_is_what_the_resampled_foreground_covers(hu, spacing):
    view = network_view(hu, AFFINE, spacing=spacing, hu_range=HU_RANGE)
    for axis, (places, part) in enumerate(zip(view.positions, view.box, strict=True)):
        n, step = view.image.shape[axis], AFFINE[axis, axis] / spacing
        everywhere = places[0] + step * (np.arange(hu.shape[axis]) - part.start)
        within = np.abs(everywhere - (n - 1) / 2) <= n / 2
        np.testing.assert_array_equal(np.flatnonzero(within), np.r_[part])
        np.testing.assert_allclose(places, everywhere[part])
