"""From a scan to a crop of it: pure functions of (sample, rng), numpy alone.

The released recipe scales HU, crops to the foreground, zooms, and takes one crop
balanced between foreground and background. Here the crop precedes scaling and zoom, so
only the patch's voxels are touched: a zoomed patch is an enlarged smaller region. `air`
is the value of empty space: `hu_range[0]` before scaling, 0 after.
"""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from swinsmt_jax.data.interpolation import interpolate
from swinsmt_jax.data.network_view import scaled
from swinsmt_jax.data.sample import Sample, foreground_box, voxel_step
from swinsmt_jax.data.store import StoredCase


def scale_hu(sample: Sample, *, hu_range: Sequence[float]) -> Sample:
    """Map HU linearly from `hu_range` to [0, 1] and clip, as float32."""
    return replace(sample, image=scaled(sample.image, hu_range=hu_range))


def crop_foreground(sample: Sample, *, air: float = 0.0) -> Sample:
    """Crop to the `foreground_box`."""
    box = foreground_box(sample.image, air=air)
    return sample.read(box)


def balanced_crop(
    source: Sample | StoredCase,
    rng: np.random.Generator,
    *,
    shape: Sequence[int],
    foreground_ratio: float = 0.5,
    air: float = 0.0,
) -> Sample:
    """Take one crop of `shape` around a foreground or a background voxel.

    The centre is a labelled voxel with probability `foreground_ratio`, otherwise an
    unlabelled voxel with image > air. If one kind does not exist, the other is used.
    The crop is shifted into the scan, or into the foreground of a stored case, which
    reads only the crop's chunks. A larger crop is padded on both sides with air and
    label 0.
    """
    box = source.bounds(air)
    labelled = rng.random() < foreground_ratio
    centre = source.draw_centre(rng, labelled=labelled, air=air)
    if centre is None:
        centre = source.draw_centre(rng, labelled=not labelled, air=air)
    if centre is None:
        centre = [int(rng.integers(side.start, side.stop)) for side in box]
    crop = []
    for c, side, within in zip(centre, shape, box, strict=True):
        last = max(within.stop - side, within.start)
        first = min(max(c - side // 2, within.start), last)
        crop.append(slice(first, min(first + side, within.stop)))
    return pad(source.read(crop), shape=shape, air=air)


def enlarge(sample: Sample, *, shape: Sequence[int]) -> Sample:
    """Interpolate to `shape` with fixed outer edges: image linear, label nearest."""
    old = np.array(sample.label.shape)
    if tuple(old) == tuple(shape):
        return sample
    ratio = old / np.array(shape)
    offset = 0.5 * ratio - 0.5
    places = [
        np.clip(r * np.arange(n) + o, 0, last)
        for r, o, n, last in zip(ratio, offset, shape, old - 1, strict=True)
    ]
    image = interpolate(sample.image.astype(np.float32), places)
    label = sample.label
    for axis in (2, 1, 0):
        label = label.take(np.floor(places[axis] + 0.5).astype(int), axis)
    affine = sample.affine @ voxel_step(offset, ratio)
    return replace(sample, image=image, label=label, affine=affine)


def pad(sample: Sample, *, shape: Sequence[int], air: float) -> Sample:
    """Pad a sample with air and label 0 to `shape`, the larger half at the end."""
    missing = [side - n for side, n in zip(shape, sample.label.shape, strict=True)]
    if not any(missing):
        return sample
    width = [(m // 2, m - m // 2) for m in missing]
    image = np.pad(sample.image, width, constant_values=air)
    affine = sample.affine @ voxel_step([-w[0] for w in width])
    return replace(
        sample, image=image, label=np.pad(sample.label, width), affine=affine
    )
