import dataclasses
from dataclasses import replace

import numpy as np
import pytest

from swinsmt_jax import checks, config, labels
from swinsmt_jax.data import augmentation
from swinsmt_jax.data.augmentation import Augmentations
from swinsmt_jax.data.sample import Sample

NAMES = [field.name for field in dataclasses.fields(Augmentations)]
OFF = Augmentations(
    **{f.name: f.type(probability=0.0) for f in dataclasses.fields(Augmentations)}
)


def acting(name, probability=1.0, **parameters):
    """All augmentations off but one."""
    spec = replace(getattr(OFF, name), probability=probability, **parameters)
    return replace(OFF, **{name: spec})


def augment(augmentations, sample, seed=0):
    return augmentation.augment(augmentations, seed, sample, labels.CLASS_NAMES)


@pytest.fixture
def sample(rng):
    """A volume whose image tells each voxel's place, and all classes."""
    shape = (10, 10, 8)
    image = np.arange(np.prod(shape), dtype=np.float32).reshape(shape) / 960
    label = rng.permutation(np.arange(image.size) % labels.NUM_CLASSES)
    return Sample(image, label.reshape(shape).astype(np.uint8), np.eye(4), "s1")


@pytest.mark.parametrize("name", NAMES)
def test_each_is_seeded_and_has_its_probability(sample, name):
    changed = 0
    for seed in range(200):
        spec = acting(name, 0.3)
        found, again = (augment(spec, sample, seed) for _ in range(2))
        region = tuple(augmentation.region(spec, seed, (12, 12, 12)))
        assert region == tuple(augmentation.region(spec, seed, (12, 12, 12)))
        np.testing.assert_array_equal(found.image, again.image)
        assert found.image.dtype == np.float32
        assert found.image.shape == sample.image.shape
        same = np.array_equal(found.image, sample.image)
        changed += not same or region != (12, 12, 12)
    assert 0.2 < changed / 200 < 0.4
    assert augment(OFF, sample) is sample


@pytest.mark.parametrize("name", sorted(set(NAMES) - {"intensity", "zoom"}))
def test_one_more_augmentation_changes_no_other_draw(sample, name):
    """Intensity shifts by as much with the other as alone."""
    both = replace(acting("intensity"), **{name: getattr(acting(name), name)})
    flat = replace(sample, image=np.full_like(sample.image, 0.5))
    for seed in range(5):
        shifted = augment(acting("intensity"), flat, seed)
        expected = augment(acting(name), shifted, seed).image
        np.testing.assert_array_equal(augment(both, flat, seed).image, expected)


def test_mirroring_exchanges_sides_in_place_and_in_name(sample):
    found = augment(acting("mirror"), sample)
    np.testing.assert_array_equal(found.image, sample.image[::-1])
    names = np.array(labels.CLASS_NAMES)
    before, after = names[sample.label[::-1]], names[found.label]
    for old, new in zip(before.flat, after.flat, strict=True):
        other = {"left": "right", "right": "left"}
        swapped = "_".join(other.get(part, part) for part in old.split("_"))
        assert new == (swapped if swapped in labels.CLASS_IDS else old)
    swap = augmentation.left_right_swap(labels.CLASS_NAMES)
    alone = [n for n in names if n == names[swap[labels.CLASS_IDS[n]]]]
    sided = [n for n in alone if "left" in n or "right" in n]
    assert sided == ["lung_middle_lobe_right", "atrial_appendage_left"]
    twice = augment(acting("mirror"), found)
    np.testing.assert_array_equal(twice.label, sample.label)


@pytest.mark.parametrize("name", sorted(set(NAMES) - {"mirror", "rotate"}))
def test_labels_stay_where_they_are_under_all_others(sample, name):
    np.testing.assert_array_equal(augment(acting(name), sample).label, sample.label)


@pytest.mark.parametrize("scale", [0.1, 0.5, 0.6, 0.9, 1.0])
def test_a_coarser_grid_moves_nothing(rng, scale):
    """A ramp along each axis stays, and voxels between the kept ones change."""
    for ramp in np.indices((12, 10, 8), np.float32):
        label = np.zeros(ramp.shape, np.uint8)
        for image, exact in ((ramp, True), (rng.random(ramp.shape, np.float32), False)):
            spec = acting("low_resolution", scale=(scale, scale))
            found = augment(spec, Sample(image, label, np.eye(4), "s1"))
            same = np.allclose(found.image, image, atol=1e-5)
            assert same == (exact or scale == 1.0)


def test_noise_gamma_and_intensity_are_as_strong_as_asked(sample):
    noisy = [augment(acting("noise", std_max=0.2), sample, seed) for seed in range(50)]
    deviations = [(found.image - sample.image).std() for found in noisy]
    assert 0.07 < np.mean(deviations) < 0.13 and max(deviations) < 0.21
    squared = augment(acting("gamma", exponent=(2.0, 2.0)), sample)
    np.testing.assert_allclose(squared.image, sample.image**2, rtol=1e-5)
    moved = [augment(acting("intensity"), sample, seed).image for seed in range(200)]
    changes = np.array([image - sample.image for image in moved]).reshape(200, -1)
    assert np.ptp(changes, axis=1).max() < 1e-5  # one number for the whole image
    assert -0.1 <= changes.min() < -0.08 and 0.08 < changes.max() <= 0.1001


def test_rotation_turns_the_axial_plane_alone(sample):
    seen = set()
    for seed in range(60):
        found = augment(acting("rotate"), sample, seed)
        (quarters,) = (
            k
            for k in range(4)
            if np.array_equal(found.image, np.rot90(sample.image, k))
        )
        np.testing.assert_array_equal(found.label, np.rot90(sample.label, quarters))
        seen.add(quarters)
    assert seen == {1, 2, 3}
    oblong = replace(sample, image=sample.image[:8], label=sample.label[:8])
    found = augment(acting("rotate"), oblong)
    np.testing.assert_array_equal(found.image, oblong.image[::-1, ::-1])


def test_zoom_reads_a_region_smaller_by_a_factor_in_its_range():
    sides = [augmentation.region(acting("zoom"), s, (96, 96, 48)) for s in range(100)]
    factors = 96 / np.array(sides)[:, 0]
    assert 1.29 < factors.min() < 1.33 and 1.47 < factors.max() < 1.51
    assert all(abs(a - b) <= 0 and abs(a - 2 * c) <= 1 for a, b, c in sides)


EXPERIMENT = {
    "model": {"name": "unetr", "in_channels": 1, "out_channels": 2, "img_size": 32},
    "optimizer": {"learning_rate": 1e-3},
    "training": {"num_steps": 1},
}


def experiment(**data):
    data = {"root": "x", "patch_shape": (32, 32, 32), "batch_size": 1, **data}
    return config.from_config_dict({**EXPERIMENT, "data": data})


@pytest.mark.parametrize(
    ("name", "values", "words"),
    [
        ("noise", {"probability": 7}, r"noise.probability is 7.0, .* lie in \[0, 1\]"),
        ("noise", {"std_max": -1.0}, r"augmentations.noise.std_max is -1.0, but must"),
        ("noise", {"std_max": "a"}, "noise.std_max is 'a', but must be a finite"),
        ("blur", {"sigma": (2, 1)}, r"blur.sigma is \(2.0, 1.0\), .*0 < low <= high"),
        ("gamma", {"exponent": (1,)}, r"gamma.exponent is \(1.0,\), but must be"),
        ("zoom", {"factor": (0.5, 1)}, r"zoom.factor is \(0.5, .* 1 <= low <= high"),
        ("low_resolution", {"scale": (0.5, 2)}, r"scale is \(0.5, 2.0\).* high <= 1\."),
        ("noise", {"sigma": 1}, "unknown config key data.augmentations.noise.sigma"),
        ("nois", {}, "unknown config key data.augmentations.nois;.*Did you.*'noise'"),
    ],
)
def test_bad_parameters_are_refused_by_name(name, values, words):
    with pytest.raises(checks.UserError, match=words):
        experiment(augmentations={name: values})


def test_keys_of_before_are_read_and_told():
    """Those of a config recorded at commit 2c20246, and one beside a new key."""
    old = {
        "zoom_probability": 0.25,
        "zoom_range": [1.1, 1.2],
        "rotate_probability": 0.0,
        "intensity_probability": 0.5,
        "intensity_shift": 0.2,
        "mirror_probability": 0.5,
        "noise_probability": 0.125,
        "noise_most": 0.3,
        "blur_probability": 0.1,
        "blur_sigma": [0.25, 0.5],
        "gamma_probability": 0.2,
        "gamma_range": [0.5, 2.0],
        "low_resolution_probability": 0.75,
        "low_resolution_range": [0.25, 0.5],
    }
    new = {
        "zoom": {"probability": 0.25, "factor": (1.1, 1.2)},
        "rotate": {"probability": 0.0},
        "intensity": {"probability": 0.5, "shift": 0.2},
        "mirror": {"probability": 0.5},
        "noise": {"probability": 0.125, "std_max": 0.3},
        "blur": {"probability": 0.1, "sigma": (0.25, 0.5)},
        "gamma": {"probability": 0.2, "exponent": (0.5, 2.0)},
        "low_resolution": {"probability": 0.75, "scale": (0.25, 0.5)},
    }
    expected = experiment(augmentations=new)
    assert experiment(**old) == expected
    mixed = {**new, "noise": {"probability": 0.9, "std_max": 0.3}}
    assert experiment(augmentations=mixed, noise_probability=0.125) == expected
    assert config.from_config_dict(config.to_dict(expected)) == expected


def test_a_key_of_before_is_named_with_the_new_one(caplog):
    with caplog.at_level("INFO", logger="absl"):
        experiment(noise_most=0.2)
    assert "noise_most is now augmentations.noise.std_max" in caplog.text


@pytest.mark.parametrize(
    "name, words", [("noise", "registered already"), ("own", "too late")]
)
def test_a_name_that_is_taken_or_late_is_refused(name, words):
    with pytest.raises(checks.UserError, match=words):
        augmentation.register(name)(type("Own", (augmentation.Augmentation,), {}))
