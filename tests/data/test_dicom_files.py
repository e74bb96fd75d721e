"""Folders with DICOM files of every kind: read right, or refused by name."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from swinsmt_jax.checks import UserError
from swinsmt_jax.config import DataConfig
from swinsmt_jax.data import dicom, nifti
from swinsmt_jax.inference import scans, segmenter

pydicom = pytest.importorskip("pydicom")
pytest.importorskip("SimpleITK")

CT = "1.2.840.10008.5.1.4.1.1.2"
STORED = np.arange(48, dtype=np.uint16).reshape(6, 8)  # of the slices' pixels


def dataset(number=1, *, sop=CT, pixels=STORED, **tags):
    """Return a slice of a CT, 2.5 mm above the one before, with changed tags."""
    found = pydicom.Dataset()
    found.SOPClassUID, found.SOPInstanceUID = sop, f"1.2.3.{number}"
    found.SeriesInstanceUID, found.Modality = "1.2.3", "CT"
    found.InstanceNumber = number
    found.ImagePositionPatient = [-4, 5, 2.5 * number]
    found.ImageOrientationPatient = [1, 0, 0, 0, 1, 0]
    found.PixelSpacing, found.SliceThickness = [2, 1.5], 2.5
    found.RescaleSlope, found.RescaleIntercept = 1, -1024
    found.PhotometricInterpretation, found.SamplesPerPixel = "MONOCHROME2", 1
    found.BitsAllocated, found.BitsStored, found.HighBit = 16, 16, 15
    found.PixelRepresentation = 0
    if pixels is not None:
        found.Rows, found.Columns = pixels.shape[:2]
        found.PixelData = pixels.tobytes()
    for name, value in tags.items():
        if value is None:
            del found[name]
        else:
            setattr(found, name, value)
    return found


def write(file, found, *, preamble=True):
    file.parent.mkdir(parents=True, exist_ok=True)
    found.file_meta = pydicom.dataset.FileMetaDataset()
    found.file_meta.TransferSyntaxUID = pydicom.uid.ExplicitVRLittleEndian
    found.file_meta.MediaStorageSOPClassUID = found.SOPClassUID
    found.file_meta.MediaStorageSOPInstanceUID = found.SOPInstanceUID
    found.save_as(file, enforce_file_format=preamble)
    if not preamble:
        file.write_bytes(file.read_bytes().removeprefix(bytes(128) + b"DICM"))


def write_series(folder, count=4, **changes):
    """Write slices; `changes` gives some numbers tags of their own."""
    for number in range(1, count + 1):
        tags = changes.get(f"n{number}", {})
        write(folder / f"{number}.dcm", dataset(number, **tags))
    return folder


def test_each_slice_has_its_own_rescaling_whatever_comes_first(tmp_path):
    half = {"RescaleSlope": 0.5, "RescaleIntercept": -1000.25}
    volume = dicom.load_series(write_series(tmp_path / "series", n3=half))
    first, third = volume.array[..., 0], volume.array[..., 2]
    assert first.max() == -1024 + 47
    assert third.max() == np.rint(0.5 * 47 - 1000.25)
    assert volume.spacing == (1.5, 2.0, 2.5) and not volume.notes


@pytest.mark.parametrize(
    "name, found, words",
    [
        ("scout", dataset(9, ImageType=["ORIGINAL", "PRIMARY", "LOCALIZER"]), "scout"),
        ("colour", dataset(9, SamplesPerPixel=3), "screen capture"),
        (
            "rs",
            dataset(9, sop="1.2.840.10008.5.1.4.1.1.481.3", pixels=None),
            "RT Struc",
        ),
        ("sr", dataset(9, sop="1.2.840.10008.5.1.4.1.1.88.33", pixels=None), "SR"),
        ("seg", dataset(9, sop="1.2.840.10008.5.1.4.1.1.66.4"), "Segmentation"),
        ("DIRFILE", dataset(9, sop="1.2.840.10008.1.3.10", pixels=None), "directory"),
        ("bare", dataset(9, pixels=None), "without pixel data"),
        ("pet", dataset(9, Modality="PT"), "PT"),
    ],
)
def test_what_is_no_slice_is_named(tmp_path, name, found, words):
    write(tmp_path / "alone" / name, found)
    with pytest.raises(UserError, match=f"no image slices of a CT.* 1 is .*{words}"):
        dicom.load_series(tmp_path / "alone")
    folder = write_series(tmp_path / "beside")
    write(folder / name, found)
    volume = dicom.load_series(folder)
    assert volume.array.shape == (8, 6, 4)
    assert words in volume.notes[0] and "were skipped" in volume.notes[0]


@pytest.mark.parametrize(
    "change, words",
    [
        ({"ImagePositionPatient": None}, "2.dcm has no ImagePositionPatient"),
        ({"PixelSpacing": None}, "2.dcm has no PixelSpacing"),
        ({"PixelSpacing": [0, 1.5]}, "PixelSpacing is .*0, 1.5.*2 positive numbers"),
        ({"ImagePositionPatient": [1, 2]}, "ImagePositionPatient is .*3 numbers"),
        ({"ImageOrientationPatient": [1, 0, 0, 1, 0, 0]}, "at a right angle"),
        ({"ImageOrientationPatient": [0, 1, 0, 1, 0, 0]}, "2.dcm has the orientation"),
        ({"PixelSpacing": [3, 1.5]}, r"2.dcm has the spacing \(3.0, 1.5\)"),
        ({"pixels": STORED[:4]}, r"2.dcm has the shape \(4.0, 8.0\)"),
        ({"RescaleType": "MGML"}, "RescaleType is 'MGML', but must be HU"),
        ({"SeriesInstanceUID": "1.2.4"}, r"2 DICOM series.*1.2.3 \(3\), 1.2.4 \(1\)"),
        ({"ImagePositionPatient": [-4, 5, 2.5]}, "apart, but others 2.50 mm"),
        ({"Rows": 60}, "2.dcm: damaged .cut short"),
        ({"Rows": None}, "2.dcm: damaged .without Rows and Columns"),
    ],
)
def test_slices_that_are_no_volume_are_refused(tmp_path, change, words):
    folder = write_series(tmp_path / "series", n2=change)
    with pytest.raises(UserError, match=words):
        dicom.load_series(folder)


def test_bytes_that_are_no_dicom_are_damage_in_one_line(tmp_path, caplog):
    folder = write_series(tmp_path / "series")
    file = folder / "3.dcm"
    place = file.read_bytes().index(b"\x28\0\x30\0DS")
    content = bytearray(file.read_bytes())
    content[place + 4 : place + 6] = b"D?"
    file.write_bytes(content)
    with pytest.raises(UserError, match="3.dcm: damaged") as caught:
        dicom.load_series(folder)
    assert len(str(caught.value).splitlines()) == 1 and not caplog.text


def test_slices_at_one_place_are_a_time_series(tmp_path):
    here = {"ImagePositionPatient": [0, 0, 7]}
    folder = write_series(tmp_path / "series", 3, n1=here, n2=here, n3=here)
    with pytest.raises(UserError, match="all 3 slices lie at the same place"):
        dicom.load_series(folder)


def test_a_single_slice_is_as_thick_as_its_tags_say(tmp_path):
    folder = write_series(tmp_path / "one", 1, n1={"SliceThickness": 5})
    assert dicom.load_series(folder).spacing == (1.5, 2.0, 5.0)
    folder = write_series(tmp_path / "none", 1, n1={"SliceThickness": None})
    with pytest.raises(UserError, match="1.dcm is a single slice, and no tag says how"):
        dicom.load_series(folder)


def test_files_without_preamble_are_read(tmp_path):
    for number in (1, 2, 3):
        write(tmp_path / f"{number}", dataset(number), preamble=False)
    assert dicom.is_series(tmp_path)
    assert dicom.load_series(tmp_path).array.shape == (8, 6, 3)


def test_frames_of_an_enhanced_ct_have_their_own_place_and_rescaling(tmp_path):
    found = dataset(1, sop="1.2.840.10008.5.1.4.1.1.2.1", pixels=None)
    for name in ("ImagePositionPatient", "RescaleSlope", "RescaleIntercept"):
        del found[name]
    found.NumberOfFrames, (found.Rows, found.Columns) = 3, STORED.shape
    found.PixelData = np.stack([STORED] * 3).tobytes()
    frames = []
    for i, (z, intercept) in enumerate([(20, -1024), (10, -1000), (15, -512)]):
        frame, place, values = (pydicom.Dataset() for _ in range(3))
        place.ImagePositionPatient = [0, 0, z]
        values.RescaleSlope, values.RescaleIntercept = 1 + i, intercept
        frame.PlanePositionSequence = [place]
        frame.PixelValueTransformationSequence = [values]
        frames.append(frame)
    found.PerFrameFunctionalGroupsSequence = frames
    write(tmp_path / "ct.dcm", found)
    volume = dicom.load_series(tmp_path)
    assert volume.spacing == (1.5, 2.0, 5.0)
    assert [plane.max() for plane in np.moveaxis(volume.array, -1, 0)] == [
        2 * 47 - 1000,
        3 * 47 - 512,
        47 - 1024,
    ]


def test_a_real_series_lies_on_its_own_labels(shared):
    folder = shared / "data" / "totalsegmentator_dicom"
    volume = dicom.load_series(folder)
    labels = nifti.load_labels(next(folder.glob("*.nii.gz")))
    nifti.require_same_grid(labels, volume)
    aorta = volume.array[labels.array == 52]
    assert aorta.size > 1000 and 0 < aorta.mean() < 500


class Bright(segmenter.Segmenter):
    """Stands in for a network: what is brighter than 200 HU is the first class."""

    class_names = {1: "spleen"}
    made_by = {"network": "a threshold"}

    def segment_volume(self, volume, *, progress=None):
        return (volume.array > 200).astype(np.uint8)


def test_a_real_series_is_segmented_onto_the_grid_of_its_labels(shared, tmp_path):
    folder = shared / "data" / "totalsegmentator_dicom"
    series = tmp_path / "series"
    series.mkdir()
    for file in folder.glob("*.dcm"):
        (series / file.name).symlink_to(file)
    config = SimpleNamespace(data=DataConfig("", (32, 32, 32), batch_size=1))
    found = scans.find_scans([series])
    out, options = tmp_path / "out", scans.OutputOptions()
    scans.segment_scans(Bright(config, None, 0), found, out, options)
    own = nifti.load_labels(out / "series.nii.gz")
    truth = nifti.load_labels(next(folder.glob("*.nii.gz")))
    nifti.require_same_grid(own, truth)
    bones = np.isin(truth.array, range(25, 51))  # vertebrae and sacrum
    assert own.array[bones].mean() > 0.3 > 10 * own.array[truth.array == 0].mean()


@pytest.fixture
def study(tmp_path):
    """Three series of a CT over three folders, two of them mixed, beside others."""
    root = tmp_path / "study"
    for uid, folders, value in (
        ("1.9.1", ("a", "b"), 1100),
        ("1.9.2", ("a",), 1500),
        ("1.9.3", ("c/deep",), 1700),
    ):
        for number in range(1, 5):
            tags = {"SeriesInstanceUID": uid, "SOPInstanceUID": f"{uid}.{number}"}
            pixels = np.full((6, 8), value + number, np.uint16)
            file = root / folders[number % len(folders)] / f"{value}_{number}.dcm"
            write(file, dataset(number, pixels=pixels, **tags))
    report = dataset(9, sop="1.2.840.10008.5.1.4.1.1.88.11", pixels=None)
    report.SeriesInstanceUID, report.Modality = "1.9.4", "SR"
    write(root / "report.dcm", report)
    (root / "notes.txt").write_text("not DICOM")
    return root


def test_each_series_of_many_folders_is_a_scan(study, tmp_path):
    found = scans.find_scans([study], series="all")
    assert set(found) == {"1.9.1", "1.9.2", "1.9.3"}
    for uid, stored in (("1.9.1", 1100), ("1.9.2", 1500), ("1.9.3", 1700)):
        volume = segmenter.load_scan(found[uid])
        assert volume.array.shape == (8, 6, 4)
        wanted = stored - 1024 + np.arange(1, 5)
        np.testing.assert_array_equal(volume.array[0, 0], wanted)
    config = SimpleNamespace(data=DataConfig("", (32, 32, 32), batch_size=1))
    out, bright = tmp_path / "out", Bright(config, None, 0)
    for _ in range(2):
        done = scans.segment_scans(bright, found, out, scans.OutputOptions())
    assert not any("error" in entry or "seconds" in entry for entry in done.values())
    volume = segmenter.load_scan(found["1.9.2"])
    assert nifti.load_labels(out / "1.9.2.nii.gz", on=volume).array.all()
    assert not nifti.load_labels(out / "1.9.1.nii.gz").array.any()


def test_one_series_of_many_is_chosen_or_named(study):
    assert list(scans.find_scans([study], series="1.9.2")) == ["1.9.2"]
    with pytest.raises(UserError, match=r"--series is 1.9.7.*1.9.1 \(4 files\)"):
        scans.find_scans([study], series="1.9.7")
    with pytest.raises(UserError, match="holds 2 DICOM series.*--series=UID or all"):
        dicom.load_series(study / "a")
    with pytest.raises(UserError, match="is not a folder of DICOM files"):
        scans.find_scans([study / "notes.txt"], series="all")
    for file in study.rglob("1*.dcm"):
        file.unlink()
    with pytest.raises(UserError, match="hold 1 DICOM series, none of them with sl"):
        scans.find_scans([study], series="all")


def test_a_damaged_series_does_not_stop_the_others(study, tmp_path):
    file = study / "c/deep/1700_2.dcm"
    file.write_bytes(file.read_bytes()[:-20])
    found = scans.find_scans([study], series="all")
    config = SimpleNamespace(data=DataConfig("", (32, 32, 32), batch_size=1))
    done = scans.segment_scans(
        Bright(config, None, 0), found, tmp_path / "out", scans.OutputOptions()
    )
    assert "1700_2.dcm: damaged (cut short" in done["1.9.3"]["error"]
    assert [uid for uid, entry in done.items() if "error" in entry] == ["1.9.3"]


def test_a_file_cut_in_its_header_is_named(study):
    file = study / "c/deep/1700_4.dcm"
    file.write_bytes(file.read_bytes()[:586])  # in the length of the pixels
    with pytest.raises(UserError, match=r"1700_4.dcm is damaged.*series is unknown"):
        scans.find_scans([study], series="all")


def test_a_file_that_tells_no_series_is_warned_of(study, caplog):
    file = study / "c/deep/1700_4.dcm"
    file.write_bytes(file.read_bytes()[:300])
    assert set(scans.find_scans([study], series="all")) == {"1.9.1", "1.9.2", "1.9.3"}
    assert (
        "1 files do not name a series, which may therefore lack them, such as"
        in caplog.text
    )
    assert "1700_4.dcm" in caplog.text


@pytest.mark.slow
def test_pydicoms_own_files_are_read_or_refused(tmp_path):
    import pydicom.data

    read = []
    for i, file in enumerate(
        Path(pydicom.data.__file__).parent.rglob("test_files/**/*")
    ):
        if file.is_file():
            folder = tmp_path / str(i)
            folder.mkdir()
            (folder / file.name).symlink_to(file)
            try:
                volume = dicom.load_series(folder)
            except UserError as error:
                assert len(str(error).splitlines()) == 1, error
            else:
                read.append((file.name, volume.spacing[2]))
    assert ("CT_small.dcm", 5.0) in read
    assert not [name for name, _ in read if "rgb" in name or name.startswith("MR")]
