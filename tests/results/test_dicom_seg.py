"""DICOM segmentations, read back by highdicom; by others in test_readers.py."""

import nibabel as nib
import numpy as np
import pytest

from swinsmt_jax.checks import UserError
from swinsmt_jax.data import dicom, nifti
from swinsmt_jax.labels import CLASS_NAMES
from swinsmt_jax.results import dicom_seg
from swinsmt_jax.results.result import Result

pydicom = pytest.importorskip("pydicom")
highdicom = pytest.importorskip("highdicom")
SHAPE = (4, 6, 5)  # slices, rows, columns
TURN = np.array([np.cos(0.35), np.sin(0.35)])
ORIENTATIONS = [
    (1, 0, 0, 0, 1, 0),
    (TURN[0], TURN[1], 0, -TURN[1], TURN[0], 0),
    (-1, 0, 0, 0, -1, 0),
    (1, 0, 0, 0, -1, 0),
    (-1, 0, 0, 0, 1, 0),
    (0, 1, 0, -1, 0, 0),
    (1, 0, 0, 0, 0, -1),
    (1, 0, 0, 0, 0, 1),
    (0, 1, 0, 0, 0, -1),
]
NAMES = {2: "kidney_right", 3: "kidney_left", 5: "liver", 40: "a part of my own"}


def series(folder, orientation, *, shape=SHAPE, upward=True, without=()):
    """Write a CT series of which each tag is there that the standard asks for."""
    folder.mkdir()
    rows, columns = np.reshape(orientation, (2, 3))[::-1]
    normal = np.cross(columns, rows) * (1 if upward else -1)
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
        found.ImagePositionPatient = list(np.round([10, 20, 30] + 3 * i * normal, 6))
        found.ImageOrientationPatient = list(np.round(orientation, 8))
        found.PixelSpacing, found.SliceThickness = [1.5, 1.0], 3.0
        found.RescaleSlope, found.RescaleIntercept = 1, -1024
        found.PhotometricInterpretation, found.SamplesPerPixel = "MONOCHROME2", 1
        found.BitsAllocated, found.BitsStored, found.HighBit = 16, 16, 15
        found.PixelRepresentation = 0
        found.Rows, found.Columns = shape[1:]
        found.PixelData = np.full(shape[1:], 1000 + i, np.uint16).tobytes()
        found.file_meta = pydicom.dataset.FileMetaDataset()
        found.file_meta.TransferSyntaxUID = pydicom.uid.ExplicitVRLittleEndian
        for name in without:
            delattr(found, name)
        found.save_as(folder / f"{9 - i}.dcm", enforce_file_format=True)
    return folder


def result_of(folder, names=NAMES, seed=0):
    volume = dicom.load_series(folder)
    rng = np.random.default_rng(seed)
    labels = rng.choice([0, *names], volume.array.shape).astype(np.uint8)
    return Result(volume, labels, names)


def places(affine, array):
    """Return {place in mm: value} of the voxels of a volume."""
    indices = np.indices(array.shape).reshape(3, -1).T
    points = np.round(nib.affines.apply_affine(affine, indices), 2) + 0.0
    return dict(zip(map(tuple, points), array.ravel().tolist(), strict=True))


@pytest.mark.parametrize("kind", dicom_seg.KINDS)
@pytest.mark.parametrize("orientation", ORIENTATIONS, ids=str)
def test_each_voxel_lies_where_its_slice_says(tmp_path, orientation, kind):
    result = result_of(series(tmp_path / "ct", orientation))
    path = tmp_path / "seg.dcm"
    dicom_seg.write(path, result, kind)
    written = highdicom.seg.segread(path)
    volume = written.get_volume(combine_segments=True)
    to_ras = np.diag([-1, -1, 1, 1]) @ volume.affine
    label = {
        d.SegmentNumber: d.SegmentLabel
        for d in (written.get_segment_description(n) for n in written.segment_numbers)
    }
    names = {0: "", **{i: label[i] for i in written.segment_numbers}}
    found = places(to_ras, volume.array)
    wanted = places(result.volume.affine, result.labels)
    assert {k: names[v] for k, v in found.items()} == {
        k: result.names.get(v, "") for k, v in wanted.items()
    }
    if kind == "labelmap":
        assert found == wanted  # ids with gaps, too
        assert written.file_meta.TransferSyntaxUID == pydicom.uid.RLELossless


def test_codes_say_what_a_structure_is_and_on_which_side(tmp_path):
    names = dict(enumerate(CLASS_NAMES)) | {200: "part of my own"}
    del names[0]
    folder = series(tmp_path / "ct", ORIENTATIONS[0], shape=(6, 16, 16))
    dicom_seg.write(tmp_path / "seg.dcm", result_of(folder, names), "labelmap")
    written = highdicom.seg.segread(tmp_path / "seg.dcm")
    assert set(written.segment_numbers) == set(names)
    said = {}
    for number, name in names.items():
        described = written.get_segment_description(number)
        assert described.SegmentLabel == name
        (kind,) = described.SegmentedPropertyTypeCodeSequence
        side = kind.get("SegmentedPropertyTypeModifierCodeSequence")
        if region := described.get("AnatomicRegionSequence"):
            side = region[0].get("AnatomicRegionModifierSequence") or side
        side = side[0].CodeMeaning if side else ""
        said[name] = (kind.CodingSchemeDesignator, kind.CodeValue, side)
        assert not side or side.lower() in name  # some codes hold the side themselves
    assert len(set(said.values())) == len(names)
    assert said["liver"] == ("SCT", "10200004", "")
    assert said["part of my own"][0] == dicom_seg.SCHEME


def test_what_cannot_be_a_segmentation_is_refused(tmp_path):
    ct = nib.Nifti1Image(np.zeros((3, 3, 3), np.int16), np.eye(4))
    nib.save(ct, tmp_path / "ct.nii")
    result = Result(
        nifti.load_ct(tmp_path / "ct.nii"), np.ones((3, 3, 3), np.uint8), NAMES
    )
    with pytest.raises(UserError, match="needs the DICOM series.*give the folder"):
        dicom_seg.write(tmp_path / "seg.dcm", result, "labelmap")
    folder = series(tmp_path / "ct", ORIENTATIONS[0], without=["StudyInstanceUID"])
    with pytest.raises(UserError, match="has no StudyInstanceUID"):
        dicom_seg.write(tmp_path / "seg.dcm", result_of(folder), "labelmap")
    folder = series(
        tmp_path / "bare", ORIENTATIONS[0], without=["PatientSex", "StudyID"]
    )
    dicom_seg.write(tmp_path / "seg.dcm", result_of(folder), "labelmap")
    empty = result_of(folder, {7: "liver"})
    with pytest.raises(UserError, match="cannot be empty"):
        dicom_seg.write(
            tmp_path / "seg.dcm",
            Result(empty.volume, 0 * empty.labels, NAMES),
            "binary",
        )
