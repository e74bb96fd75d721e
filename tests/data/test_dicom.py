"""Series that SimpleITK wrote slice by slice, read as volumes and predicted."""

import locale
from types import SimpleNamespace

import nibabel as nib
import numpy as np
import pytest

from swinsmt_jax.checks import UserError
from swinsmt_jax.config import DataConfig
from swinsmt_jax.data import dicom, nifti
from swinsmt_jax.inference import scans as batches
from swinsmt_jax.inference import segmenter as prediction

sitk = pytest.importorskip("SimpleITK")
SPACING = (0.8, 0.9)
STEP = np.array([0.0, 0.7, 2.0])  # of a tilted gantry: slices shift to the back
ORIGIN = np.array([-11.0, 7.0, 30.0])


def write_series(folder, hu, **options):
    before = locale.setlocale(locale.LC_ALL)
    try:
        _write_series(folder, hu, **options)
    finally:
        locale.setlocale(locale.LC_ALL, before)  # writing DICOM sets it to C
    return folder


def _write_series(folder, hu, *, series="1.2.3.4", modality="CT", skip=()):
    folder.mkdir(parents=True, exist_ok=True)
    writer = sitk.ImageFileWriter()
    writer.KeepOriginalImageUIDOn()
    for i in range(hu.shape[2]):
        if i in skip:
            continue
        image = sitk.GetImageFromArray(np.ascontiguousarray(hu[:, :, i].T))
        image.SetSpacing(SPACING)
        place = ORIGIN + i * STEP
        tags = {
            "0008|0060": modality,
            "0008|0018": f"{series}.{i + 1}",
            "0020|000d": "1.2.3",
            "0020|000e": series,
            "0020|0032": "\\".join(f"{x:.3f}" for x in place),
            "0020|0037": "1\\0\\0\\0\\1\\0",
            "0020|0013": str(i + 1),
        }
        for name, value in tags.items():
            image.SetMetaData(name, value)
        writer.SetFileName(str(folder / f"{series}_{hu.shape[2] - i:03}.dcm"))
        writer.Execute(image)


@pytest.fixture
def hu(rng):
    return rng.integers(-1000, 1000, (6, 8, 5)).astype(np.int16)


def test_a_series_is_the_volume_that_its_slices_say(tmp_path, hu):
    folder = write_series(tmp_path / "series", hu)
    assert dicom.is_series(folder) and not dicom.is_series(tmp_path)
    affine = np.eye(4)
    affine[:3, :3] = np.array([[-0.8, 0, 0], [0, -0.9, -0.7], [0, 0, 2.0]])
    affine[:3, 3] = (11.0, -7.0, 30.0)
    nib.save(nib.Nifti1Image(hu, affine), tmp_path / "ct.nii")
    found, expected = dicom.load_series(folder), nifti.load_ct(tmp_path / "ct.nii")
    np.testing.assert_array_equal(found.array, expected.array)
    np.testing.assert_allclose(found.affine, expected.affine, atol=1e-5)
    np.testing.assert_allclose(found.source_affine, affine, atol=1e-5)


def test_bad_series_are_refused(tmp_path, hu):
    folder = write_series(tmp_path / "holes", hu, skip=(2,))
    with pytest.raises(UserError, match="lie 4.24 mm apart, but others 2.12 mm"):
        dicom.load_series(folder)
    folder = write_series(tmp_path / "mr", hu, modality="MR")
    with pytest.raises(
        UserError, match=r"no image slices of a CT. Of its 5 .* 5 are MR"
    ):
        dicom.load_series(folder)
    folder = write_series(tmp_path / "two", hu)
    write_series(folder, hu, series="1.2.3.5")
    with pytest.raises(UserError, match=r"2 DICOM series.*1\.2\.3\.5.*\(5\)"):
        dicom.load_series(folder)
    with pytest.raises(UserError, match="no image slices of a CT. Of its 0"):
        dicom.load_series(tmp_path)
    folder = write_series(tmp_path / "cut", hu)
    file = sorted(folder.iterdir())[0]
    file.write_bytes(file.read_bytes()[:-40])
    with pytest.raises(UserError, match=rf"1 DICOM files are damaged.*{file.name}"):
        dicom.load_series(folder)


def test_a_series_is_found_and_segmented_as_a_scan(tmp_path, hu):
    class Half(prediction.Segmenter):
        def segment_volume(self, volume, *, progress=None):
            return (volume.array > 0).astype(np.uint8)

        class_names, made_by = {1: "spleen"}, {}
        made_by = {"network": "a threshold"}

    folder = write_series(tmp_path / "patient", hu)
    config = SimpleNamespace(data=DataConfig("", (32, 32, 32), batch_size=1))
    scans, segmenter = batches.find_scans([folder]), Half(config, None, 0)
    assert scans == {"patient": folder}
    options = batches.OutputOptions()
    batches.segment_scans(segmenter, scans, tmp_path / "out", options)
    image = nib.load(tmp_path / "out" / "patient.nii.gz")
    np.testing.assert_array_equal(np.asarray(image.dataobj), hu > 0)
    prediction.save(tmp_path / "own.nii", segmenter.segment(folder), like=folder)
    own = nib.load(tmp_path / "own.nii")
    np.testing.assert_array_equal(np.asarray(own.dataobj), hu > 0)
    np.testing.assert_array_equal(own.affine, image.affine)
