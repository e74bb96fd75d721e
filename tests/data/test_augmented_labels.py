"""Image and labels stay on each other, whatever augments them."""

import contextlib
import itertools
from dataclasses import replace

import numpy as np
import pytest

from swinsmt_jax import checks
from swinsmt_jax.data import pipeline
from swinsmt_jax.data.augmentation import (
    Augmentations,
    Blur,
    Gamma,
    Intensity,
    LowResolution,
    Mirror,
    Noise,
    Rotate,
    Zoom,
)
from swinsmt_jax.data.sample import Sample

FIRST, STEP = -800, 40  # HU of the first voxel and of each further one
CERTAIN = {
    "nothing": {},
    "zoom": {"zoom": Zoom(1.0)},
    "rotate": {"rotate": Rotate(1.0)},
    "intensity": {"intensity": Intensity(1.0, shift=1e-3)},
    "mirror": {"mirror": Mirror(1.0)},
    "noise": {"noise": Noise(1.0, std_max=1e-3)},
    "blur": {"blur": Blur(1.0)},
    "gamma": {"gamma": Gamma(1.0, exponent=(1.5, 1.5))},
    "low_resolution": {"low_resolution": LowResolution(1.0, scale=(0.5, 0.5))},
}
CERTAIN["all"] = {key: value for one in CERTAIN.values() for key, value in one.items()}
OFF = {"zoom": Zoom(0.0), "rotate": Rotate(0.0), "intensity": Intensity(0.0)}


@pytest.fixture(scope="module")
def ramps(tmp_path_factory, write_store):
    """A store of three scans whose HU and labels tell the place on one axis each."""
    places = np.indices((40, 40, 40))
    samples = [
        Sample(
            (FIRST + STEP * place).astype(np.int16),
            (place + 1).astype(np.uint8),
            np.eye(4),
            f"axis{axis}",
        )
        for axis, place in enumerate(places)
    ]
    root = tmp_path_factory.mktemp("ramps") / "store"
    return write_store(root, samples, tuple(f"plane{i}" for i in range(40)))


@pytest.mark.parametrize("name", CERTAIN)
def test_labels_stay_on_the_image_under_each_augmentation(ramps, name):
    """Places read off the image and off the labels differ by less than half a voxel.

    An enlarged label is the nearest voxel's, up to half a voxel away on either side.
    """
    augmentations = Augmentations(**OFF | CERTAIN[name])
    config = replace(
        ramps, patch_shape=(24, 24, 24), batch_size=3, augmentations=augmentations
    )
    cases = pipeline.find_cases(config, split="train")
    rounding = 0.5 if "zoom" in CERTAIN[name] else 0.0
    power = 1 / 1.5 if "gamma" in CERTAIN[name] else 1.0
    with contextlib.closing(
        pipeline.training_batches(config, cases, seed=0)
    ) as batches:
        taken = list(itertools.islice(batches, 4))
    for batch in taken:
        assert batch["label"].min() > 0
        hu = batch["image"][..., 0].astype(float) ** power * 2048 - 1024
        apart = (hu - FIRST) / STEP - (batch["label"] - 1.0)
        assert np.abs(apart).max() < rounding + 0.45
        # Enlarged by exactly 1.5, a third of the voxels lie between two: all go up.
        assert np.abs(apart.mean(axis=(1, 2, 3))).max() < 0.25


def test_mirroring_of_classes_without_counterparts_is_refused(tmp_path, write_store):
    sample = Sample(*np.zeros((2, 8, 8, 8), np.uint8), np.eye(4), "s1")
    config = write_store(tmp_path / "store", [sample], ("kidney_left", "liver"))
    cases = pipeline.find_cases(config, split="train")
    pipeline.training_batches(config, cases, seed=0).close()
    with pytest.raises(checks.UserError, match="other side of kidney_left is missing"):
        mirrored = Augmentations(mirror=Mirror(0.5))
        pipeline.training_batches(
            replace(config, augmentations=mirrored), cases, seed=0
        )
