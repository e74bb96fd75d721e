import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from swinsmt_jax.data import transforms
from swinsmt_jax.data.sample import Sample

SHAPE = (14, 12, 10)


def sample_of(image, label):
    return Sample(image, label, np.diag([2.0, 3, 4, 1]), "case")


def coded(shape=SHAPE):
    """Image and label both hold each voxel's own number, the label modulo 251."""
    number = 1 + np.arange(np.prod(shape)).reshape(shape)
    return sample_of(number.astype(np.float32), (number % 251).astype(np.uint8))


def assert_aligned(sample):
    inside = sample.image > 0
    code = np.rint(sample.image).astype(int) % 251
    np.testing.assert_array_equal(sample.label[inside], code[inside])
    assert np.all(sample.label[~inside] == 0)


def test_hu_are_scaled_and_clipped_as_in_the_recipe():
    hu = np.array([-3000, -1024, 0, 512, 1024, 3000], np.int16).reshape(1, 2, 3)
    sample = transforms.scale_hu(sample_of(hu, hu), hu_range=(-1024, 1024))
    expected = [0, 0, 0.5, 0.75, 1, 1]
    np.testing.assert_array_equal(sample.image.ravel(), np.float32(expected))
    assert sample.image.dtype == np.float32


def test_foreground_crop_is_the_tight_box_and_keeps_world_places():
    image = np.zeros(SHAPE, np.float32)
    image[3, 4:6, 2] = image[7, 5, 8] = 1
    label = np.indices(SHAPE)[0].astype(np.uint8)
    crop = transforms.crop_foreground(sample_of(image, label))
    assert crop.image.shape == (5, 2, 7)
    np.testing.assert_array_equal(crop.label, label[3:8, 4:6, 2:9])
    np.testing.assert_allclose(crop.affine[:3, 3], (3 * 2, 4 * 3, 2 * 4))
    empty = sample_of(np.zeros(SHAPE), label)
    assert transforms.crop_foreground(empty).image.shape == SHAPE


@settings(max_examples=60, deadline=None)
@given(st.tuples(*[st.integers(1, 20)] * 3), st.floats(0, 1), st.integers(0, 2**32 - 1))
def test_crops_have_the_shape_asked_and_keep_image_on_label(shape, ratio, seed):
    sample = coded()
    crop = transforms.balanced_crop(
        sample, np.random.default_rng(seed), shape=shape, foreground_ratio=ratio
    )
    assert crop.image.shape == crop.label.shape == shape
    assert_aligned(crop)
    kept = np.unique(crop.image[crop.image > 0])
    assert kept.size == np.prod(np.minimum(shape, SHAPE))  # never more air than needed
    first = np.argwhere(crop.image > 0)[0]
    old = np.argwhere(sample.image == crop.image[tuple(first)])[0]
    np.testing.assert_allclose(
        crop.affine @ [*first, 1], sample.affine @ [*old, 1], atol=1e-9
    )


def test_crop_centres_are_uniform_over_the_kind_drawn(rng):
    """Crops of one voxel show which centres were drawn."""
    image = np.zeros(SHAPE, np.float32)
    label = np.zeros(SHAPE, np.uint8)
    image[4:10, 4:8] = 1  # 240 voxels, of which
    label[4:6, 4:6, :5] = np.arange(1, 21).reshape(2, 2, 5)  # 20 are labelled
    counts = np.zeros(21, int)
    for _ in range(3000):
        crop = transforms.balanced_crop(
            sample_of(image, label), rng, shape=(1, 1, 1), foreground_ratio=0.7
        )
        assert crop.image.item() == 1  # the background lies inside the body
        counts[crop.label.item()] += 1
    assert abs(counts[0] / 3000 - 0.3) < 0.03
    assert np.all(np.abs(counts[1:] - 105) < 45)


def test_rare_voxels_are_found(rng):
    label = np.zeros((40, 40, 40), np.uint8)
    label[11, 22, 33] = 7
    sample = sample_of(np.zeros(label.shape, np.float32), label)
    for ratio in (1.0, 0.0):  # there is no background above air: foreground is taken
        crop = transforms.balanced_crop(
            sample, rng, shape=(3, 3, 3), foreground_ratio=ratio
        )
        assert crop.label[1, 1, 1] == 7


def test_empty_volume_still_gives_a_crop(rng):
    empty = sample_of(np.zeros(SHAPE, np.float32), np.zeros(SHAPE, np.uint8))
    crop = transforms.balanced_crop(empty, rng, shape=(4, 4, 16))
    assert crop.image.shape == (4, 4, 16)


def test_padding_is_air_before_and_after_scaling(rng):
    hu = np.full((2, 2, 2), 500, np.int16)
    label = np.ones((2, 2, 2), np.uint8)
    crop = transforms.balanced_crop(
        sample_of(hu, label), rng, shape=(5, 4, 4), air=-1024
    )
    scaled = transforms.scale_hu(crop, hu_range=(-1024, 1024))
    assert np.all((scaled.image == 0) == (scaled.label == 0))
    assert (scaled.image > 0).sum() == 8


@pytest.mark.parametrize("side", [24, 18, 16])
def test_an_enlarged_crop_magnifies_image_and_label_alike(rng, side):
    """On a linear ramp, neighbours differ by side / 24, and the label follows."""
    ramp = np.indices((60, 50, 40))[0].astype(np.float32) + 1
    scan = sample_of(ramp, ramp.astype(np.uint8))
    crop = transforms.balanced_crop(scan, rng, shape=(side,) * 3)
    crop = transforms.enlarge(crop, shape=(24, 24, 24))
    assert crop.image.shape == crop.label.shape == (24, 24, 24)
    slope = np.diff(crop.image, axis=0)[3:-3]
    np.testing.assert_allclose(slope, side / 24, atol=1e-4)
    assert np.abs(crop.image - crop.label).max() <= 0.51
    np.testing.assert_allclose(
        np.linalg.norm(crop.affine[:3, :3], axis=0), np.array([2, 3, 4]) * side / 24
    )
