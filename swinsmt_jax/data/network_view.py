"""A whole scan as the network sees it in training: its foreground, scaled."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from nibabel import orientations

from swinsmt_jax.config import Seen
from swinsmt_jax.data import resampling
from swinsmt_jax.data.sample import foreground_box, voxel_step
from swinsmt_jax.data.spacing import Sides
from swinsmt_jax.data.voxels import normalizing

FAR = 1.5  # times the sides of voxels that a network saw


@dataclass(frozen=True)
class NetworkView:
    """The network's view of a scan, and its place in the scan.

    Attributes:
        image: float32 [D, H, W, 1], the smallest box around the foreground, resampled
            and scaled.
        shape: of the scan, with axes in the order of `image`.
        box: the slices of the scan that `image` covers.
        positions: of their planes, rows and columns on the grid of `image`, in voxels;
            None if both grids are the same.
        fill: value of air, which surrounds the scan if a window is larger.
        axes: orientation [3, 2] from the scan's axes to these, in nibabel's form; None
            if they are the same.
    """

    image: np.ndarray
    shape: tuple[int, ...]
    box: tuple[slice, ...]
    positions: tuple[np.ndarray, ...] | None
    fill: float = 0.0
    axes: np.ndarray | None = None

    def on_scan(self, labels: np.ndarray) -> np.ndarray:
        """Return the labels of the box on the whole scan, in its axes; 0 outside.

        Further axes are kept.
        """
        whole = np.zeros((*self.shape, *labels.shape[3:]), labels.dtype)
        whole[self.box] = labels
        if self.axes is None:
            return whole
        scan = np.array([[0, 1], [1, 1], [2, 1]])
        back = orientations.ornt_transform(scan, self.axes)
        return np.ascontiguousarray(orientations.apply_orientation(whole, back))


def network_view(
    hu: np.ndarray,
    affine: np.ndarray,
    *,
    spacing: Sides,
    hu_range: Sequence[float],
    normalization: Sequence[float] = (),
) -> NetworkView:
    """Resample, crop and scale a scan as in training, without augmentation.

    Args:
        hu: [X, Y, Z] in RAS orientation.
        affine: [4, 4] of the scan.
        spacing, hu_range, normalization: as in `config.DataConfig`.
    """
    image, own = hu, affine
    if spacing:
        image, own = resampling.resample(hu, affine, spacing=spacing, order=1)
    foreground = foreground_box(image, air=hu_range[0])
    start = voxel_step([part.start for part in foreground])
    image = scaled(image[foreground], hu_range=hu_range)[..., None]
    scale, air = normalizing(hu_range, normalization)
    image = image * scale + air if normalization else image
    if own is affine:
        return NetworkView(image, hu.shape, foreground, None, fill=float(air))
    positions = resampling.positions(hu.shape, affine, on=own @ start)
    box = tuple(
        slice(*np.searchsorted(axis, (-0.5, n - 0.5)).tolist())
        for axis, n in zip(positions, image.shape, strict=False)
    )
    inside = tuple(axis[part] for axis, part in zip(positions, box, strict=True))
    return NetworkView(image, hu.shape, box, inside, fill=float(air))


def unlike_training(spacing: Sides, seen: Seen, affine: np.ndarray) -> str:
    """Warn if the voxels of a scan are far from those of training; or "".

    If scans keep their own voxels, a network knows only the sides that it saw.

    Args:
        spacing, seen: as in `config.DataConfig`.
        affine: [4, 4] of the scan, in RAS orientation.
    """
    if spacing or not seen.least:
        return ""
    sides = np.linalg.norm(affine[:3, :3], axis=0)
    low, high = np.divide(seen.least, FAR), np.multiply(seen.most, FAR)
    if np.all(sides >= low) and np.all(sides <= high):
        return ""
    return (
        f"its voxels measure {' x '.join(f'{s:.3g}' for s in sides)} mm, but the "
        "network was trained at scans' own spacings, from "
        f"{' x '.join(f'{s:g}' for s in seen.least)} to "
        f"{' x '.join(f'{s:g}' for s in seen.most)} mm; do not trust its labels, or "
        "train on a store made with --spacing."
    )


def scaled(hu: np.ndarray, *, hu_range: Sequence[float]) -> np.ndarray:
    """Map HU linearly from `hu_range` to [0, 1] and clip, as float32."""
    low, high = hu_range
    image = hu.astype(np.float32)
    image -= np.float32(low)
    image /= np.float32(high - low)
    return np.clip(image, 0.0, 1.0, out=image)
