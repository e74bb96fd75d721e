"""Augmentations that the released recipe lacks and strong ones have (nnU-Net's).

Pure functions of (sample, rng), numpy and scipy; each acts with a probability and is
off by default. The image is scaled: 0 is air, and values stay in [0, 1] but for noise.
"""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from scipy import ndimage

from swinsmt_jax.class_map import V2
from swinsmt_jax.data import transforms
from swinsmt_jax.data.case import Sample

MIRRORED = V2.exchanged()


def mirror(
    sample: Sample,
    rng: np.random.Generator,
    *,
    probability: float,
    exchanged: np.ndarray = MIRRORED,
) -> Sample:
    """Exchange the patient's right and left, in the image and in the labels' names.

    `exchanged` is the label id of each id's counterpart (`ClassMap.exchanged`).

    Structures without a counterpart (the middle lobe of the right lung, the atrial
    appendage of the left) keep their name, so a mirrored patient is not quite a
    patient. The affine of a mirrored sample is no longer of use and kept as it was.
    """
    if rng.random() >= probability:
        return sample
    image, label = sample.image[::-1], exchanged[sample.label[::-1]]
    return replace(sample, image=image, label=label)


def noise(
    sample: Sample, rng: np.random.Generator, *, probability: float, most: float
) -> Sample:
    """Add Gaussian noise whose standard deviation is uniform in [0, most]."""
    if rng.random() >= probability:
        return sample
    deviation = np.float32(rng.uniform(0, most))
    added = rng.standard_normal(sample.image.shape, np.float32) * deviation
    return replace(sample, image=sample.image + added)


def blur(
    sample: Sample,
    rng: np.random.Generator,
    *,
    probability: float,
    sigma: Sequence[float],
) -> Sample:
    """Smooth by a Gaussian of a standard deviation uniform in `sigma`, in voxels."""
    if rng.random() >= probability:
        return sample
    smooth = ndimage.gaussian_filter(sample.image, rng.uniform(*sigma), mode="nearest")
    return replace(sample, image=smooth)


def gamma(
    sample: Sample,
    rng: np.random.Generator,
    *,
    probability: float,
    exponents: Sequence[float],
) -> Sample:
    """Raise the image to a power uniform in `exponents`; values are clipped at 0."""
    if rng.random() >= probability:
        return sample
    power = np.float32(rng.uniform(*exponents))
    return replace(sample, image=np.maximum(sample.image, 0) ** power)


def low_resolution(
    sample: Sample,
    rng: np.random.Generator,
    *,
    probability: float,
    scales: Sequence[float],
) -> Sample:
    """Keep the voxels of a coarser grid and interpolate the others linearly.

    The ratio of the grids is uniform in `scales`, at most 1. The voxels kept stay where
    they are, the outermost among them, so that nothing moves.
    """
    if rng.random() >= probability:
        return sample
    scale = rng.uniform(*scales)
    shape = sample.image.shape
    kept = [
        np.linspace(0, n - 1, min(n, max(2, round(n * scale)))).round().astype(int)
        for n in shape
    ]
    places = [
        np.interp(np.arange(n), k, np.arange(len(k)))
        for n, k in zip(shape, kept, strict=True)
    ]
    small = sample.image[np.ix_(*kept)]
    return replace(sample, image=transforms.interpolate(small, places))
