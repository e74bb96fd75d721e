"""Statistics, surfaces and colour tables of labels, on bodies of known size."""

import csv
import io
import json

import nibabel as nib
import numpy as np
import pytest
from scipy.spatial.transform import Rotation

from swinsmt_jax.data import nifti
from swinsmt_jax.results import colour_tables, meshes, statistics
from swinsmt_jax.results.result import Result

trimesh = pytest.importorskip("trimesh")
pytest.importorskip("skimage")
NAMES = {1: "spleen", 2: "liver", 7: "a vessel"}


def result_of(labels, affine=None, hu=None):
    hu = np.zeros(labels.shape) if hu is None else hu
    volume = nifti.from_array(hu, np.eye(4) if affine is None else affine)
    return Result(volume, nifti.from_array(labels, volume.source_affine).array, NAMES)


def box(shape, *slices, number=1):
    labels = np.zeros(shape, np.uint8)
    labels[slices] = number
    return labels


def test_statistics_say_sizes_with_their_units():
    labels = box((12, 10, 8), slice(2, 6), slice(3, 6), slice(1, 3))
    hu = np.full(labels.shape, -1000.0)
    hu[labels == 1] = np.arange(24) * 10 - 100
    affine = np.diag([2.0, 2.0, 5.0, 1.0])
    result = result_of(labels.astype(np.int16), affine, hu)
    found = statistics.measure(result)
    spleen = found["spleen"]
    assert spleen["voxels"] == 24 and spleen["volume_ml"] == 24 * 20 / 1000
    assert spleen["mean_hu"] == 15 and spleen["p50_hu"] == 15
    assert spleen["sd_hu"] == pytest.approx(np.std(np.arange(24) * 10), abs=0.05)
    assert spleen["mass_g"] == pytest.approx(0.48 * 1.015, abs=1e-3)
    bands = [value for name, value in spleen.items() if name.startswith("mass_g_")]
    assert len(bands) == 4 and sum(bands) == pytest.approx(spleen["mass_g"], abs=2e-3)
    assert spleen["mass_g_-190_to_-30_hu"] == pytest.approx(7 * 0.02 * 0.93, abs=1e-3)
    assert (spleen["right_min_mm"], spleen["right_max_mm"]) == (3, 11)
    assert (spleen["head_min_mm"], spleen["head_max_mm"]) == (2.5, 12.5)
    assert spleen["largest_diameter_mm"] == pytest.approx(
        np.sqrt(36 + 16 + 25), abs=0.01
    )
    assert found["liver"]["voxels"] == 0 and found["liver"]["mean_hu"] is None
    (first, *_) = csv.DictReader(io.StringIO(statistics.as_csv(result)))
    assert first["class"] == "spleen" and float(first["p95_hu"]) == spleen["p95_hu"]
    assert json.loads(statistics.as_json(result))["structures"] == found


def test_a_ball_has_its_diameter(rng):
    grid = np.indices((40, 40, 40)) - 20
    labels = ((grid**2).sum(0) <= 15**2).astype(np.int16)
    found = statistics.measure(result_of(labels))["spleen"]
    assert found["largest_diameter_mm"] == 30


SHAPES = {
    "box": box((20, 20, 20), slice(5, 12), slice(4, 15), slice(6, 9)),
    "edge": box((12, 12, 12), slice(0, 6), slice(4, 12), slice(0, 12)),
    "voxel": box((9, 9, 9), 4, 4, 4),
    "sheet": box((16, 16, 16), 7, slice(3, 13), slice(3, 13)),
    "line": box((9, 9, 40), 4, 4, slice(3, 37)),
}
DIRECTIONS = [
    np.diag(signs).astype(float)
    for signs in np.ndindex(2, 2, 2)
    for signs in [2 * np.array(signs) - 1]
] + [
    Rotation.from_euler("xyz", (20, -10, 35), degrees=True).as_matrix(),
    np.eye(3)[[1, 2, 0]],
]


@pytest.mark.parametrize(
    "direction", DIRECTIONS, ids=lambda d: str(np.round(d, 1).tolist())
)
@pytest.mark.parametrize("name", SHAPES)
def test_a_surface_encloses_its_voxels_in_their_place(name, direction):
    affine = np.eye(4)
    affine[:3, :3] = direction @ np.diag([1.5, 1.0, 2.0])
    affine[:3, 3] = (10, -20, -1500)
    labels = SHAPES[name].astype(np.int16)
    vertices, faces = meshes.surface(result_of(labels, affine), 1)
    surface = trimesh.Trimesh(vertices, faces)
    assert surface.is_watertight and surface.is_winding_consistent
    assert surface.volume == pytest.approx(3 * (labels == 1).sum(), rel=0.01)
    places = np.argwhere(labels == 1) @ affine[:3, :3].T + affine[:3, 3]
    places *= [-1, -1, 1]  # to the left and back
    np.testing.assert_allclose(surface.center_mass, places.mean(0), atol=0.1)
    spread = (
        np.abs(vertices.min(0) - places.min(0)),
        np.abs(vertices.max(0) - places.max(0)),
    )
    assert np.max(spread) < 2.0  # a voxel at most


@pytest.mark.parametrize("form", meshes.FORMATS)
def test_each_label_has_a_surface_of_its_own(tmp_path, form):
    labels = box((20, 14, 14), slice(2, 8), slice(2, 12), slice(2, 12), number=7)
    labels[8:14, 2:12, 2:12] = 1  # they touch
    meshes.write(tmp_path / "m", result_of(labels.astype(np.int16)), form)
    files = {file.name for file in (tmp_path / "m").iterdir()}
    assert files == {f"spleen.{form}", f"a vessel.{form}"}
    for name in files if form != "vtp" else ():
        assert trimesh.load(tmp_path / "m" / name).volume == pytest.approx(
            600, rel=0.01
        )


@pytest.mark.reference
def test_vtk_reads_surfaces_with_outward_faces(tmp_path):
    vtk = pytest.importorskip("vtk")
    labels = SHAPES["box"].astype(np.int16)
    readers = {"stl": vtk.vtkSTLReader, "ply": vtk.vtkPLYReader}
    for form in meshes.FORMATS:
        meshes.write(tmp_path / form, result_of(labels, np.diag([-1, 2, 1, 1])), form)
        reader = readers.get(form, vtk.vtkXMLPolyDataReader)()
        reader.SetFileName(str(tmp_path / form / f"spleen.{form}"))
        reader.Update()
        size = vtk.vtkMassProperties()
        size.SetInputData(reader.GetOutput())
        size.Update()
        assert size.GetVolume() == pytest.approx(2 * labels.sum(), rel=0.01)
        assert reader.GetOutput().GetNumberOfPolys() > 10


def test_colour_tables_name_every_label():
    slicer = colour_tables.slicer(NAMES).splitlines()
    assert [line.split()[:2] for line in slicer[1:]] == [
        ["0", "background"],
        ["1", "spleen"],
        ["2", "liver"],
        ["7", "a_vessel"],
    ]
    assert all(len(line.split()) == 6 for line in slicer[1:])
    rows = colour_tables.itk_snap(NAMES).splitlines()
    assert rows[-1].startswith("7 ") and rows[-1].endswith(' 1 1 1 "a vessel"')
    assert slicer[2].split()[2:5] == rows[1].split()[1:4]


def test_niivue_gets_every_id_in_order(tmp_path):
    file = tmp_path / "labels.nii"
    shuffled = {7: "a vessel", 2: "liver", 1: "spleen"}
    table = colour_tables.niivue(shuffled)
    assert table["I"] == list(range(8))
    assert [table["labels"][i] for i in (0, 1, 2, 3, 7)] == [
        *("", "spleen", "liver", "", "a vessel")
    ]
    assert [a > 0 for a in table["A"]] == [i in shuffled for i in range(8)]
    rows = [line.split() for line in colour_tables.slicer(shuffled).splitlines()[2:]]
    for number, _, *rgba in rows:
        own = [str(table[c][int(number)]) for c in "RGBA"]
        assert own == rgba
    widget = pytest.importorskip("ipyniivue")
    nib.save(nib.Nifti1Image(np.zeros((2, 2, 2), np.uint8), np.eye(4)), file)
    volume = widget.Volume(path=str(file))
    volume.set_colormap_label(table)
    lut = volume.colormap_label
    assert lut.labels[int(7 - lut.min)] == "a vessel"
    assert lut.labels[int(2 - lut.min)] == "liver"
