"""What others make of the files that are written: the table of docs/formats.md."""

import json
import subprocess
import sys
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from swinsmt_jax.data import dicom, nifti
from swinsmt_jax.labels import CLASS_NAMES
from swinsmt_jax.results import dicom_seg
from swinsmt_jax.results.result import Result
from tests.results.test_dicom_seg import ORIENTATIONS

pytestmark = pytest.mark.reference
pydicom = pytest.importorskip("pydicom")
highdicom = pytest.importorskip("highdicom")
sitk = pytest.importorskip("SimpleITK")
NAMES = {2 * i - 1: name for i, name in enumerate(CLASS_NAMES) if i}  # ids with gaps
LPS = np.diag([-1.0, -1.0, 1.0, 1.0])


def series(folder, orientation, *, shape=(5, 16, 14)):
    """Write a CT series whose pixels are not square, of 3 mm from slice to slice."""
    folder.mkdir()
    columns, rows = np.reshape(orientation, (2, 3))
    for i in range(shape[0]):
        found = pydicom.Dataset()
        found.SOPClassUID = pydicom.uid.CTImageStorage
        found.SOPInstanceUID = f"1.2.3.4.{i + 1}"
        found.StudyInstanceUID, found.SeriesInstanceUID = "1.2.3", "1.2.3.4"
        found.FrameOfReferenceUID, found.Modality = "1.2.3.5", "CT"
        found.PatientID, found.PatientName = "p", "Doe^Jane"
        found.PatientBirthDate = found.PatientSex = found.AccessionNumber = ""
        found.StudyDate = found.StudyTime = found.StudyID = ""
        found.ReferringPhysicianName, found.Manufacturer = "", "m"
        found.SeriesNumber, found.InstanceNumber = 1, i + 1
        place = [10, 20, 30] + 3 * i * np.cross(columns, rows)
        found.ImagePositionPatient = list(np.round(place, 6))
        found.ImageOrientationPatient = list(np.round(orientation, 8))
        found.PixelSpacing, found.SliceThickness = [2.0, 1.0], 3.0
        found.RescaleSlope, found.RescaleIntercept = 1, -1024
        found.PhotometricInterpretation, found.SamplesPerPixel = "MONOCHROME2", 1
        found.BitsAllocated, found.BitsStored, found.HighBit = 16, 16, 15
        found.PixelRepresentation = 0
        found.Rows, found.Columns = shape[1:]
        found.PixelData = np.full(shape[1:], 1000 + i, np.uint16).tobytes()
        found.file_meta = pydicom.dataset.FileMetaDataset()
        found.file_meta.TransferSyntaxUID = pydicom.uid.ExplicitVRLittleEndian
        found.save_as(folder / f"{i}.dcm", enforce_file_format=True)
    return folder


def result_of(folder):
    """Each of the 117 structures has voxels."""
    volume = dicom.load_series(folder)
    rng = np.random.default_rng(0)
    labels = rng.choice([0, *NAMES], volume.array.shape).astype(np.uint8)
    assert set(np.unique(labels)) == {0, *NAMES}
    return Result(volume, labels, NAMES)


def places(affine, array, names=None):
    """Return {place in mm: value, or its name} of the voxels of a volume."""
    points = nib.affines.apply_affine(affine, np.indices(array.shape).reshape(3, -1).T)
    values = np.asarray(array).ravel().tolist()
    if names is not None:
        values = [names.get(value, "") for value in values]
    return dict(zip(map(tuple, np.round(points, 2) + 0.0), values, strict=True))


@pytest.fixture(scope="module", params=ORIENTATIONS, ids=str)
def written(request, tmp_path_factory):
    """A result, and its two segmentation objects."""
    folder = tmp_path_factory.mktemp("seg")
    result = result_of(series(folder / "ct", request.param))
    for kind in dicom_seg.KINDS:
        dicom_seg.write(folder / f"{kind}.dcm", result, kind)
    return result, folder


@pytest.mark.parametrize("kind", dicom_seg.KINDS)
def test_highdicom_reads_117_segments_in_their_places(written, kind):
    result, folder = written
    file = highdicom.seg.segread(folder / f"{kind}.dcm")
    volume = file.get_volume(combine_segments=True)
    names = {n: file.get_segment_description(n) for n in file.segment_numbers}
    names = {number: d.SegmentLabel for number, d in names.items()}
    wanted = NAMES if kind == "labelmap" else dict(enumerate(NAMES.values(), start=1))
    assert names == {0: "Background"} | wanted or names == wanted
    names.pop(0, None)
    assert places(LPS @ volume.affine, volume.array, names) == places(
        result.volume.affine, result.labels, NAMES
    )


@pytest.mark.parametrize("kind", dicom_seg.KINDS)
def test_dcmqi_reads_117_segments_in_their_places(written, kind):
    pytest.importorskip("dcmqi")
    result, folder = written
    out = folder / f"dcmqi_{kind}"
    out.mkdir()
    reader = Path(sys.executable).with_name("segimage2itkimage")
    command = [reader, "--inputDICOM", folder / f"{kind}.dcm"]
    command += ["--outputDirectory", out, "--outputType", "nii"]
    subprocess.run(list(map(str, command)), check=True, capture_output=True)
    told = json.loads((out / "meta.json").read_text())["segmentAttributes"]
    names = {s["labelID"]: s["SegmentLabel"] for group in told for s in group}
    names.pop(0, None)
    found: dict = {}
    if kind == "labelmap":
        image = nib.load(out / "1.nii.gz")
        assert names == NAMES  # numbers with gaps, too
        found = places(image.affine, np.asarray(image.dataobj), names)
    else:
        assert len(list(out.glob("*.nii.gz"))) == len(NAMES)
        for number, group in enumerate(told, start=1):  # a file for each segment
            image = nib.load(out / f"{number}.nii.gz")
            own = places(image.affine, np.asarray(image.dataobj))
            (segment,) = group
            label = segment["SegmentLabel"]
            found |= {p: label if on else found.get(p, "") for p, on in own.items()}
    assert found == places(result.volume.affine, result.labels, NAMES)


def test_simpleitk_has_no_reader_of_a_labelmap_and_stacks_a_binary_one(tmp_path):
    result = result_of(series(tmp_path / "ct", ORIENTATIONS[0]))
    for kind in dicom_seg.KINDS:
        dicom_seg.write(tmp_path / f"{kind}.dcm", result, kind)
    with pytest.raises(RuntimeError, match="Unable to determine ImageIO reader"):
        sitk.ReadImage(str(tmp_path / "labelmap.dcm"))
    stack = sitk.ReadImage(str(tmp_path / "binary.dcm"))
    frames = sum(len(np.unique(p)) - (0 in p) for p in result.labels.transpose(2, 0, 1))
    assert stack.GetSize()[2] == frames > 5 * 50  # one after the other, not in place
    assert set(np.unique(sitk.GetArrayFromImage(stack))) == {0, 255}


@pytest.mark.parametrize("ending", [".nii.gz", ".nii", ".nrrd", ".mha"])
def test_simpleitk_reads_label_files_in_their_places(tmp_path, ending):
    result = result_of(series(tmp_path / "ct", ORIENTATIONS[1]))
    path = tmp_path / f"labels{ending}"
    nifti.save_labels(path, result.labels, like=result.volume)
    image = sitk.ReadImage(str(path))
    affine = np.eye(4)
    sides = np.diag(image.GetSpacing())
    affine[:3, :3] = np.reshape(image.GetDirection(), (3, 3)) @ sides
    affine[:3, 3] = image.GetOrigin()
    array = sitk.GetArrayFromImage(image).transpose()
    assert places(LPS @ affine, array, NAMES) == places(
        result.volume.affine, result.labels, NAMES
    )


def test_simpleitk_scales_probabilities(tmp_path):
    result = result_of(series(tmp_path / "ct", ORIENTATIONS[0]))
    share = (result.labels > 100).astype(np.uint8) * 204
    nifti.save(tmp_path / "p.nii.gz", share, like=result.volume, slope=1 / 255)
    array = sitk.GetArrayFromImage(sitk.ReadImage(str(tmp_path / "p.nii.gz")))
    np.testing.assert_allclose(np.unique(array), [0, 0.8], atol=1e-6)


@pytest.mark.filterwarnings("ignore")
def test_rt_utils_exchanges_the_sides_of_pixels_so_it_is_not_used(tmp_path):
    builder = pytest.importorskip("rt_utils").RTStructBuilder
    folder = series(tmp_path / "ct", ORIENTATIONS[0])
    rt = builder.create_new(dicom_series_path=str(folder))
    mask = np.zeros((16, 14, 5), bool)
    mask[8:13, 2:6, 2] = True  # rows, columns: 10 to 15 mm right of the first voxel
    rt.add_roi(mask=mask, name="box")
    (contour,) = rt.ds.ROIContourSequence[0].ContourSequence
    x, y, _ = np.reshape(contour.ContourData, (-1, 3)).astype(float).T
    middle = 10 + 1.0 * 3.5, 20 + 2.0 * 10  # of the box in mm
    assert np.ptp(x) == 2.0 * 3 and np.ptp(y) == 1.0 * 4  # 3 and 8 mm are right
    assert abs((x.min() + x.max()) / 2 - middle[0]) > 3
    assert abs((y.min() + y.max()) / 2 - middle[1]) > 9
