"""The place of a NIfTI file's voxels, as nibabel and ITK read its header.

Lengths are in mm whatever the unit of the header. ITK stands for SimpleITK, 3D Slicer
and ITK-SNAP.
"""

from collections.abc import Sequence
from pathlib import Path

import nibabel as nib
import numpy as np

TO_MM = {1: 1e3, 2: 1.0, 3: 1e-3}  # metres, mm, micrometres; unknown is mm
UNITS = {1: "metres", 3: "micrometres"}
UNIT_BITS = 7  # of xyzt_units; the others are of time
SKEW = 1e-4  # cosine between axes from which on ITK refuses them
NOTABLE = 0.1  # mm between two places of a corner
PLACING = (
    *("pixdim", "xyzt_units", "qform_code", "sform_code"),
    *(f"quatern_{axis}" for axis in "bcd"),
    *(f"{form}_{axis}" for form in ("qoffset", "srow") for axis in "xyz"),
)


def to_mm(header: nib.Nifti1Header) -> float:
    """Return the mm of a length of 1 in a header."""
    return TO_MM.get(_unit(header), 1.0)


def affine_in_mm(image: nib.Nifti1Pair) -> np.ndarray:
    """Return nibabel's affine [4, 4], scaled to mm."""
    return _scaled(image.affine, to_mm(image.header))


def header_like(
    source: nib.Nifti1Header | None, affine: np.ndarray, shape: Sequence[int]
) -> nib.Nifti1Header:
    """Return a header that every reader places where another file lies.

    Args:
        source: header of the other file, which gives sform, qform, codes, voxel sides
            and unit; None for a scan that is not NIfTI.
        affine: [4, 4] in mm, of a scan that is not NIfTI.
        shape: of the new file.
    """
    header = nib.Nifti1Header()
    header.set_data_shape(shape)
    if source is None:
        header.set_xyzt_units("mm")
        header.set_sform(affine, 1)
        header.set_zooms(np.linalg.norm(affine[:3, :3], axis=0))
        if skew(affine) < SKEW:  # a quaternion knows no shear
            header.set_qform(affine, 1)
        return header
    for field in PLACING:
        header[field] = source[field]
    header["pixdim"][4:] = 1
    quaternion = [f"quatern_{axis}" for axis in "bcd"]
    length = np.linalg.norm([header[part] for part in quaternion])
    for part in quaternion:  # longer than 1 by rounding, which nibabel refuses
        header[part] /= max(length, 1)
    return header


def skew(affine: np.ndarray) -> float:
    """Return the largest cosine between two axes of an affine [4, 4]."""
    axes = affine[:3, :3] / np.linalg.norm(affine[:3, :3], axis=0)
    return float(np.abs(axes.T @ axes - np.eye(3)).max())


def by_itk(image: nib.Nifti1Pair) -> np.ndarray | None:
    """Return the affine [4, 4] in mm that ITK reads; None if it refuses the file.

    ITK takes the sform if its axes are at right angles and its code is 1 or the qform
    is missing. Otherwise it takes the qform. Voxel sides come from pixdim. With both
    codes 0 the axes run to left, back and head from voxel 0.
    """
    header = image.header
    sides = np.abs(header["pixdim"][1:4])
    sform, qform = _forms(header)
    with_qform = header["qform_code"] > 0
    if sform is not None and skew(sform) < SKEW:
        if header["sform_code"] == 1 or not with_qform:
            return _with_sides(sform, sides, to_mm(header))
    if isinstance(qform, np.ndarray):
        return _with_sides(qform, sides, to_mm(header))
    if with_qform or sform is not None:
        return None
    return _scaled(np.diag([-sides[0], -sides[1], sides[2], 1.0]), to_mm(header))


def notes(path: Path, image: nib.Nifti1Pair, shape: Sequence[int]) -> tuple[str, ...]:
    """State in one line what a header leaves open about the place of its voxels.

    Args:
        path: the file.
        image: its header.
        shape: of the volume, [X, Y, Z].
    """
    if len(shape) != 3:
        return ()
    header, said = image.header, []
    sform, qform = _forms(header)
    if _unit(header) in UNITS:
        said.append(f"its lengths are in {UNITS[_unit(header)]}, and were read to mm")
    if sform is None and qform is None:
        said.append(
            "its sform and qform have code 0, so its orientation is unknown; the axes "
            "are taken to run to left, front and head: check left and right"
        )
    elif isinstance(qform, str):
        said.append(f"its qform cannot be read ({qform}); the sform is taken")
    elif sform is not None and qform is not None:
        miss = corner_distance(shape, sform, qform) * to_mm(header)
        if miss >= NOTABLE:
            said.append(
                f"its sform and qform disagree by up to {miss:.1f} mm; the sform is "
                "taken, so check left and right"
            )
    said += _beside_itk(image, shape)
    return (f"{path}: {'; '.join(said)}.",) if said else ()


def sheared_note(path: Path, affine: np.ndarray) -> tuple[str, ...]:
    """Note if ITK cannot open labels of a scan that is not NIfTI."""
    if skew(affine) < SKEW:
        return ()
    return (
        f"{path}: its axes are not at right angles, as of a tilted gantry; ITK "
        "(SimpleITK, 3D Slicer) cannot open NIfTI files of such labels.",
    )


def corner_distance(
    shape: Sequence[int], affine: np.ndarray, other: np.ndarray
) -> float:
    """Return a corner's largest distance along an axis between two grids."""
    corners = np.indices((2, 2, 2)).reshape(3, -1).T * (np.array(shape) - 1)
    corners = np.concatenate([corners, np.ones((8, 1))], axis=1)
    return float(np.abs(corners @ (affine - other).T).max())


def difference(
    shape: Sequence[int],
    affine: np.ndarray,
    other_shape: Sequence[int],
    other: np.ndarray,
) -> str:
    """Describe in mm how two grids differ, both in RAS orientation.

    The text names a likely cause: half a voxel, a reversed axis, missing slices.

    Args:
        shape, affine: of the grid.
        other_shape, other: of the other.
    """
    corner, other_corner = (
        own @ np.append(np.array(n) - 1, 1.0)
        for own, n in ((affine, shape), (other, other_shape))
    )
    first, last = (affine - other)[:3, 3], (corner - other_corner)[:3]
    shift = (np.linalg.inv(other) @ affine)[:3, 3]  # in voxels of the other grid
    said = [
        f"its first voxel lies {_mm(first)} mm and its last one {_mm(last)} mm (to the "
        "right, front and head) from the other's"
    ]
    for axis, (n, wanted, by) in enumerate(zip(shape, other_shape, shift, strict=True)):
        side = ("right", "front", "head")[axis]
        if n != wanted:
            said.append(f"it has {n} planes to the {side}, and the other {wanted}")
        elif n > 2 and np.isclose(abs(by), n - 1, atol=0.02):
            said.append(f"its axis to the {side} seems to run the other way: flip it")
        elif np.isclose(abs(by), 0.5, atol=0.02):
            said.append(
                f"that is half a voxel along the axis to the {side}: one tool counts "
                "from the voxels' centres and one from their edges"
            )
    return "; ".join(said)


def _mm(place):
    return f"({', '.join(f'{0 if abs(x) < 5e-3 else x:+.2f}' for x in place)})"


def _beside_itk(image, shape):
    affine = affine_in_mm(image)
    if not np.linalg.norm(affine[:3, :3], axis=0).all():
        return []
    other = by_itk(image)
    if other is None:
        return [
            "its axes are not at right angles, so ITK (SimpleITK, 3D Slicer) cannot "
            "open it or its labels"
        ]
    miss = corner_distance(shape, affine, other)
    if miss < NOTABLE:
        return []
    return [
        f"ITK (SimpleITK, 3D Slicer) places it and its labels up to {miss:.1f} mm from "
        "where nibabel does, whose place is used here"
    ]


def _forms(header):
    """Return sform and qform, None for code 0, or a reason for a bad qform."""
    try:
        qform = header.get_qform(coded=True)[0]
    except Exception as error:  # of whatever a rounded quaternion breaks
        qform = str(error)
    return header.get_sform(coded=True)[0], qform


def _unit(header):
    return int(header["xyzt_units"]) & UNIT_BITS


def _scaled(affine, factor):
    return np.diag([factor, factor, factor, 1.0]) @ affine


def _with_sides(affine, sides, factor):
    """Return the affine with other voxel sides, all in mm."""
    affine = affine.copy()
    affine[:3, :3] *= sides / np.linalg.norm(affine[:3, :3], axis=0)
    return _scaled(affine, factor)
