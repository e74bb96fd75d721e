"""Surfaces of structures for 3D printing and viewers; needs the extra `mesh`.

A surface is closed, even at the edge of the scan, and its faces point outward for every
orientation of the voxels. Its vertices are in mm to the patient's left, back and head
(LPS), as DICOM, 3D Slicer and ITK have them.
"""

import importlib.util
from pathlib import Path

import numpy as np
from scipy import ndimage

from swinsmt_jax import checks
from swinsmt_jax.results.result import Result

FORMATS = ("stl", "ply", "vtp")
SIGMA = 0.8  # voxels, of the Gaussian that smooths a mask
KEPT = 0.98  # share of a structure's voxels that must stay inside of a smooth surface
TOLERANCE = 0.002  # of the volume, by which a surface may differ from the voxels
MARGIN = 4  # voxels around a mask


def write(folder: Path, result: Result, form: str) -> None:
    """Write `<structure>.<form>` for each structure present.

    Args:
        folder: to be made.
        result: the labels.
        form: of `FORMATS`.

    Raises:
        UserError: as `require`.
    """
    require()
    import trimesh

    folder.mkdir()
    for number in result.boxes:
        vertices, faces = surface(result, number)
        path = folder / f"{result.names[number]}.{form}"
        if form == "vtp":
            path.write_text(_vtp(vertices, faces))
        else:
            trimesh.Trimesh(vertices, faces, process=False).export(path)


def require() -> None:
    """Raise `UserError` without the extra."""
    checks.require(
        all(map(importlib.util.find_spec, ("trimesh", "skimage"))),
        'meshes need trimesh and scikit-image: pip install "swinsmt_jax[mesh]".',
    )


def surface(result: Result, number: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the surface of a structure that encloses the volume of its voxels.

    The level of the isosurface (marching cubes, Lewiner 2003) is chosen so that the
    enclosed volume is that of the voxels. It is that of the smoothed mask, unless this
    would lose parts of the structure, as of a thin vessel.

    Returns:
        Vertices [n, 3] in mm (LPS) and faces [m, 3], counter-clockwise from outside.
    """
    from skimage import measure

    mask = np.pad(result.mask(number), MARGIN).astype(np.float32)
    smooth = ndimage.gaussian_filter(mask, SIGMA)
    wanted = float(mask.sum())

    def at(field, level):
        return measure.marching_cubes(field, level, gradient_direction="ascent")[:2]

    def fitted(field):
        low, high = 0.0, float(field.max())
        for _ in range(24):
            level = (low + high) / 2
            found = at(field, level)
            volume = enclosed(*found)
            if abs(volume - wanted) <= TOLERANCE * wanted:
                break
            low, high = (level, high) if volume > wanted else (low, level)
        return level, found

    level, found = fitted(smooth)
    if np.mean(smooth[mask > 0] >= level) < KEPT:
        _, found = fitted(mask)
    vertices, faces = found
    start = np.array([part.start for part in result.boxes[number]])
    places = result.to_mm(vertices - MARGIN + start) * [-1, -1, 1]
    if np.linalg.det(result.volume.affine[:3, :3]) < 0:
        faces = faces[:, ::-1]
    return places, faces


def enclosed(vertices: np.ndarray, faces: np.ndarray) -> float:
    """Return the volume inside of a closed surface; negative if it is inside out."""
    a, b, c = (vertices[faces[:, i]].astype(np.float64) for i in range(3))
    return float(np.einsum("ni,ni->", a, np.cross(b, c)) / 6)


def _vtp(vertices, faces):
    """Return VTK's XML of a surface."""

    def numbers(array, form):
        return "\n".join(" ".join(form % x for x in row) for row in array)

    count = len(faces)
    return f"""<?xml version="1.0"?>
<VTKFile type="PolyData" version="1.0" byte_order="LittleEndian">
<PolyData>
<Piece NumberOfPoints="{len(vertices)}" NumberOfPolys="{count}">
<Points>
<DataArray type="Float32" NumberOfComponents="3" format="ascii">
{numbers(vertices, "%.4f")}
</DataArray>
</Points>
<Polys>
<DataArray type="Int32" Name="connectivity" format="ascii">
{numbers(faces, "%d")}
</DataArray>
<DataArray type="Int32" Name="offsets" format="ascii">
{" ".join(str(3 * (i + 1)) for i in range(count))}
</DataArray>
</Polys>
</Piece>
</PolyData>
</VTKFile>
"""
