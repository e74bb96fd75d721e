"""A scalar volume in RAS orientation, and a comparison of two grids."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import nibabel as nib
import numpy as np
from nibabel import orientations

from swinsmt_jax import checks
from swinsmt_jax.data import geometry

GRID_TOLERANCE = 0.1  # voxels by which the corners of one grid may miss another's


@dataclass(frozen=True)
class Volume:
    """A scalar volume whose axes run to the patient's right, front and head (RAS).

    Attributes:
        array: [X, Y, Z].
        affine: [4, 4], voxel indices of `array` to world millimetres.
        source_affine: [4, 4] of the file, always in mm.
        source_shape: shape of the file's volume.
        path: the file, for messages.
        notes: facts that a user should know about the file, in sentences.
        header: of the file if it is NIfTI; outputs keep its place in space.
    """

    array: np.ndarray
    affine: np.ndarray
    source_affine: np.ndarray
    source_shape: tuple[int, int, int]
    path: Path
    notes: tuple[str, ...] = ()
    header: nib.Nifti1Header | None = None

    @property
    def spacing(self) -> tuple[float, float, float]:
        """Voxel sides in mm."""
        return spacing_of(self.affine)

    @property
    def sides(self) -> tuple[float, float, float]:
        """Voxel sides in mm from the header of the file, in float32."""
        sides = np.array(spacing_of(self.source_affine), np.float32)
        if self.header is not None:
            sides = np.abs(self.header["pixdim"][1:4]) * geometry.to_mm(self.header)
        to_ras = orientations.io_orientation(self.source_affine)
        x, y, z = (float(sides[i]) for i in np.argsort(to_ras[:, 0]))
        return x, y, z


def spacing_of(affine: np.ndarray) -> tuple[float, float, float]:
    """Return the voxel sides in mm of an affine [4, 4]."""
    x, y, z = np.linalg.norm(affine[:3, :3], axis=0)
    return float(x), float(y), float(z)


def ras_grid(
    affine: np.ndarray, shape: Sequence[int]
) -> tuple[np.ndarray, tuple[int, ...]]:
    """Return affine [4, 4] and shape in RAS orientation of a grid with any axes."""
    affine = np.array(affine, np.float64)
    to_ras = orientations.io_orientation(affine)
    ras = affine @ orientations.inv_ornt_aff(to_ras, shape)
    return ras, tuple(shape[i] for i in np.argsort(to_ras[:, 0]))


def ras_spacing(affine: np.ndarray) -> tuple[float, float, float]:
    """Return the voxel sides in mm to the right, front and head, for axes in any order.

    Args:
        affine: [4, 4] of a file.
    """
    return spacing_of(ras_grid(affine, (1, 1, 1))[0])


def in_file_axes(array: np.ndarray, like: Volume) -> np.ndarray:
    """Convert an array [X, Y, Z] from RAS orientation to the axes of a file."""
    to_ras = orientations.io_orientation(like.source_affine)
    from_ras = orientations.ornt_transform(orientations.axcodes2ornt("RAS"), to_ras)
    return np.ascontiguousarray(orientations.apply_orientation(array, from_ras))


def require_same_grid(
    volume: Volume, reference: Volume, *, cut: bool = False
) -> tuple[slice, ...]:
    """Return the reference voxels that a volume covers; otherwise raise `UserError`.

    Both are in RAS. The volume must have the reference's grid or, if it may be `cut`, a
    smaller grid cut out of it. No corner may be off by more than `GRID_TOLERANCE`
    voxels.
    """
    grid, wanted = volume.array.shape, reference.array.shape
    to_voxels = np.linalg.inv(reference.affine) @ volume.affine
    shift = np.eye(4)
    if grid != wanted:
        shift[:3, 3] = np.rint(to_voxels[:3, 3])
    miss = geometry.corner_distance(grid, to_voxels, shift)
    start = shift[:3, 3].astype(int).tolist()
    box = tuple(slice(a, a + n) for a, n in zip(start, grid, strict=True))
    remedy = (
        f"{geometry.difference(grid, volume.affine, wanted, reference.affine)}. A "
        "segmentation must lie on the voxel grid of its CT: resample it; evaluate.py "
        "--regrid does that with predictions."
    )
    inside = all(0 <= b.start and b.stop <= n for b, n in zip(box, wanted, strict=True))
    checks.require(
        grid == wanted or (cut and inside and miss <= GRID_TOLERANCE),
        f"{volume.path} has shape {grid} in RAS orientation, but {reference.path} has "
        f"shape {wanted}: {remedy}",
    )
    checks.require(
        miss <= GRID_TOLERANCE,
        f"the affine of {volume.path} places its voxels up to {miss:.2f} voxels away "
        f"from those of {reference.path}, more than the {GRID_TOLERANCE} allowed: "
        f"{remedy}",
    )
    return box


def same_grid(volume: Volume, reference: Volume) -> bool:
    """Return whether two volumes in RAS have the same voxels in the same place."""
    shape, to_voxels = volume.array.shape, np.linalg.inv(reference.affine)
    miss = geometry.corner_distance(shape, to_voxels @ volume.affine, np.eye(4))
    return shape == reference.array.shape and miss <= GRID_TOLERANCE
