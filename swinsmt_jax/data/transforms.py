"""Augmentation of the released recipe: pure functions of (sample, rng), numpy alone.

The recipe scales HU, crops to the foreground, zooms, takes one crop balanced between
foreground and background, rotates by quarter turns and shifts the intensity. Here the
crop comes before scaling and zoom, so that only the voxels of the patch are touched:
a zoomed patch is a smaller region, enlarged. `air` is the value of empty space:
`hu_range[0]` before scaling, 0 after.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np

from swinsmt_jax.data.case import Sample

DRAWS = 256  # voxels tried at random before all voxels are searched


def scale_hu(sample: Sample, *, hu_range: Sequence[float]) -> Sample:
    """Map HU linearly from `hu_range` to [0, 1] and clip, as float32."""
    return replace(sample, image=scaled(sample.image, hu_range=hu_range))


def scaled(hu: np.ndarray, *, hu_range: Sequence[float]) -> np.ndarray:
    """Return `scale_hu` of an image alone."""
    low, high = hu_range
    image = hu.astype(np.float32)
    image -= np.float32(low)
    image /= np.float32(high - low)
    return np.clip(image, 0.0, 1.0, out=image)


def crop_foreground(sample: Sample, *, air: float = 0.0) -> Sample:
    """Crop to the `foreground_box`."""
    box = foreground_box(sample.image, air=air)
    return _take(sample, [part.start for part in box], [p.stop - p.start for p in box])


def foreground_box(image: np.ndarray, *, air: float) -> tuple[slice, ...]:
    """Return the smallest box around the voxels > air; all of an image without any."""
    above = image > air
    box = []
    for axis in range(3):
        others = tuple(a for a in range(3) if a != axis)
        hit = np.flatnonzero(above.any(axis=others))
        if hit.size == 0:
            return tuple(slice(0, n) for n in image.shape)
        box.append(slice(int(hit[0]), int(hit[-1]) + 1))
    return tuple(box)


def balanced_crop(
    sample: Sample,
    rng: np.random.Generator,
    *,
    shape: Sequence[int],
    foreground_ratio: float = 0.5,
    air: float = 0.0,
) -> Sample:
    """Take one crop of `shape` around a foreground or a background voxel.

    The centre is a labelled voxel with probability `foreground_ratio`, else an
    unlabelled voxel with image > air; where one kind does not exist, the other is
    taken. The crop is shifted to lie inside the volume; a volume smaller than the crop
    is padded on both sides with air and label 0.
    """
    want_foreground = rng.random() < foreground_ratio
    centre = _draw_centre(sample, rng, want_foreground, air)
    if centre is None:
        centre = _draw_centre(sample, rng, not want_foreground, air)
    if centre is None:
        centre = [int(rng.integers(n)) for n in sample.label.shape]
    start = []
    for c, side, n in zip(centre, shape, sample.label.shape, strict=True):
        start.append(min(max(c - side // 2, 0), max(n - side, 0)))
    return pad(_take(sample, start, shape), shape=shape, air=air)


def zoomed_crop(
    sample: Sample,
    rng: np.random.Generator,
    *,
    shape: Sequence[int],
    foreground_ratio: float = 0.5,
    probability: float = 0.3,
    zoom_range: Sequence[float] = (1.3, 1.5),
    air: float = 0.0,
    crop: Callable[..., Sample] = balanced_crop,
) -> Sample:
    """Take a balanced crop of `shape`, enlarged with the given probability.

    The zoom factor is uniform in `zoom_range`; the region that fills the crop after
    enlargement is read, then interpolated (image linear, label nearest). `crop` takes
    it, from whatever `sample` is to it.
    """
    factor = rng.uniform(*zoom_range) if rng.random() < probability else 1.0
    region = [max(1, round(side / factor)) for side in shape]
    taken = crop(sample, rng, shape=region, foreground_ratio=foreground_ratio, air=air)
    return enlarge(taken, shape=shape)


def enlarge(sample: Sample, *, shape: Sequence[int]) -> Sample:
    """Interpolate to `shape`, outer edges fixed: image linear, label nearest."""
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
    affine = sample.affine @ _step(ratio, offset)
    return replace(sample, image=image, label=label, affine=affine)


def interpolate(image: np.ndarray, places: Sequence[np.ndarray]) -> np.ndarray:
    """Interpolate a float32 image linearly at places along each axis, within it.

    Matrix products would do the same, but their threads wait for one another, many
    times as long, wherever readers or other programs share the cores.
    """
    for axis in (2, 1, 0):  # the slow axis while the image is small
        last = image.shape[axis] - 1
        below = np.clip(np.floor(places[axis]).astype(int), 0, max(last - 1, 0))
        weights = np.expand_dims(
            (places[axis] - below).astype(np.float32),
            [a for a in range(3) if a != axis],
        )
        first = image.take(below, axis)
        step = image.take(np.minimum(below + 1, last), axis)
        step -= first
        step *= weights
        step += first
        image = step
    return image


def rotate(
    sample: Sample, rng: np.random.Generator, *, probability: float = 0.1
) -> Sample:
    """Rotate by 90, 180 or 270 degrees in the axial plane (axes 0 and 1).

    A crop that is not square there is only rotated by 180 degrees. The affine of a
    rotated sample is no longer of use and is kept as it was.
    """
    turn = rng.random() < probability
    quarters = int(rng.integers(1, 4))
    if not turn:
        return sample
    if sample.label.shape[0] != sample.label.shape[1]:
        quarters = 2
    image = np.rot90(sample.image, quarters, axes=(0, 1))
    return replace(
        sample, image=image, label=np.rot90(sample.label, quarters, axes=(0, 1))
    )


def shift_intensity(
    sample: Sample,
    rng: np.random.Generator,
    *,
    probability: float = 0.2,
    shift: float = 0.1,
) -> Sample:
    """Add one number, uniform in [-shift, shift], to the whole scaled image."""
    change = rng.random() < probability
    offset = np.float32(rng.uniform(-shift, shift))
    return replace(sample, image=sample.image + offset) if change else sample


def _draw_centre(
    sample: Sample, rng: np.random.Generator, foreground: bool, air: float
) -> Sequence[int] | None:
    """Draw one voxel, uniform among those of the kind wanted, or None without any."""
    shape = sample.label.shape

    def wanted(where):
        labelled = sample.label[where] > 0
        return labelled if foreground else ~labelled & (sample.image[where] > air)

    tries = rng.integers(shape, size=(DRAWS, 3))
    hits = np.flatnonzero(wanted(tuple(tries.T)))
    if hits.size:
        return tries[hits[0]].tolist()
    voxels = np.flatnonzero(wanted(...))
    if voxels.size == 0:
        return None
    return [int(i) for i in np.unravel_index(rng.choice(voxels), shape)]


def _take(sample: Sample, start: Sequence[int], shape: Sequence[int]) -> Sample:
    where = tuple(slice(s, s + n) for s, n in zip(start, shape, strict=True))
    affine = sample.affine @ _step(np.ones(3), np.array(start, float))
    return replace(
        sample, image=sample.image[where], label=sample.label[where], affine=affine
    )


def pad(sample: Sample, *, shape: Sequence[int], air: float) -> Sample:
    """Surround a sample with air and label 0 to `shape`, the larger half behind."""
    missing = [side - n for side, n in zip(shape, sample.label.shape, strict=True)]
    if not any(missing):
        return sample
    width = [(m // 2, m - m // 2) for m in missing]
    image = np.pad(sample.image, width, constant_values=air)
    affine = sample.affine @ _step(np.ones(3), -np.array([w[0] for w in width], float))
    return replace(
        sample, image=image, label=np.pad(sample.label, width), affine=affine
    )


def _step(scale: np.ndarray, offset: np.ndarray) -> np.ndarray:
    """Affine [4, 4] that maps new voxel indices to old ones."""
    step = np.eye(4)
    step[:3, :3] = np.diag(scale)
    step[:3, 3] = offset
    return step
