import numpy as np
import pytest

from swinsmt_jax import checks, labels
from swinsmt_jax.config import DataConfig
from swinsmt_jax.data import augmentation
from swinsmt_jax.data.case import Sample


@pytest.fixture
def sample(rng):
    """A volume whose image tells each voxel's place, and all classes."""
    shape = (12, 10, 8)
    image = np.arange(np.prod(shape), dtype=np.float32).reshape(shape) / 960
    label = rng.permutation(np.arange(960) % labels.NUM_CLASSES).reshape(shape)
    return Sample(image, label.astype(np.uint8), np.eye(4), "s1")


OPTIONS = {
    "mirror": {},
    "noise": {"most": 0.1},
    "blur": {"sigma": (0.5, 1.0)},
    "gamma": {"exponents": (0.7, 1.5)},
    "low_resolution": {"scales": (0.5, 0.9)},
}


@pytest.mark.parametrize("name", OPTIONS)
def test_each_is_seeded_and_has_its_probability(sample, name):
    function, options = getattr(augmentation, name), OPTIONS[name]
    changed = 0
    for seed in range(200):
        found, again = (
            function(sample, np.random.default_rng(seed), probability=0.3, **options)
            for _ in range(2)
        )
        np.testing.assert_array_equal(found.image, again.image)
        assert found.image.dtype == np.float32 and found.image.shape == (12, 10, 8)
        changed += not np.array_equal(found.image, sample.image)
    assert 0.2 < changed / 200 < 0.4


def test_mirroring_exchanges_sides_in_place_and_in_name(sample):
    found = augmentation.mirror(sample, np.random.default_rng(0), probability=1.0)
    np.testing.assert_array_equal(found.image, sample.image[::-1])
    names = np.array(labels.CLASS_NAMES)
    before, after = names[sample.label[::-1]], names[found.label]
    for old, new in zip(before.flat, after.flat, strict=True):
        other = {"left": "right", "right": "left"}
        swapped = "_".join(other.get(part, part) for part in old.split("_"))
        assert new == (swapped if swapped in labels.CLASS_IDS else old)
    alone = [n for n in names if n == names[augmentation.MIRRORED[labels.CLASS_IDS[n]]]]
    sided = [n for n in alone if "left" in n or "right" in n]
    assert sided == ["lung_middle_lobe_right", "atrial_appendage_left"]
    twice = augmentation.mirror(found, np.random.default_rng(0), probability=1.0)
    np.testing.assert_array_equal(twice.label, sample.label)


def test_labels_stay_where_they_are_under_all_others(sample):
    for name in set(OPTIONS) - {"mirror"}:
        found = getattr(augmentation, name)(
            sample, np.random.default_rng(0), probability=1.0, **OPTIONS[name]
        )
        np.testing.assert_array_equal(found.label, sample.label)


@pytest.mark.parametrize("scale", [0.1, 0.5, 0.6, 0.9, 1.0])
def test_a_coarser_grid_moves_nothing(rng, scale):
    """A ramp along each axis stays, and voxels between the kept ones change."""
    for ramp in np.indices((12, 10, 8), np.float32):
        label = np.zeros(ramp.shape, np.uint8)
        for image, exact in ((ramp, True), (rng.random(ramp.shape, np.float32), False)):
            found = augmentation.low_resolution(
                Sample(image, label, np.eye(4), "s1"),
                np.random.default_rng(0),
                probability=1.0,
                scales=(scale, scale),
            )
            same = np.allclose(found.image, image, atol=1e-5)
            assert same == (exact or scale == 1.0)


def test_noise_and_gamma_are_as_strong_as_asked(sample):
    rng = np.random.default_rng(0)
    noisy = [
        augmentation.noise(sample, rng, probability=1.0, most=0.2) for _ in range(50)
    ]
    deviations = [(found.image - sample.image).std() for found in noisy]
    assert 0.07 < np.mean(deviations) < 0.13 and max(deviations) < 0.21
    squared = augmentation.gamma(sample, rng, probability=1.0, exponents=(2.0, 2.0))
    np.testing.assert_allclose(squared.image, sample.image**2, rtol=1e-5)


def test_impossible_ranges_are_refused():
    base = {"root": "x", "patch_shape": (32, 32, 32), "batch_size": 1}
    with pytest.raises(checks.UserError, match=r"low_resolution_range is \(0.5, 2.0\)"):
        DataConfig(**base, low_resolution_range=(0.5, 2.0))
    with pytest.raises(checks.UserError, match="mirror_probability is 2"):
        DataConfig(**base, mirror_probability=2.0)
