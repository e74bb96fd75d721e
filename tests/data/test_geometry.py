"""One marked voxel of each kind of header lies in one place, as CT and as labels.

Places are in mm to the right, front and head, as nibabel, SimpleITK and the package
read the file. Where the readers of the CT differ, so do those of the labels.
"""

import gzip
import itertools
import struct

import nibabel as nib
import numpy as np
import pytest

from swinsmt_jax.data import nifti

sitk = pytest.importorskip("SimpleITK")
SHAPE, MARKED = (5, 6, 7), (1, 2, 3)
AFFINE = np.array([[-2.0, 0, 0, 20], [0, -2, 0, -5], [0, 0, 3, 1], [0, 0, 0, 1]])
PLACE = (18, -9, 10)  # of the marked voxel
MOVED = AFFINE + 0.0
MOVED[:3, 3] += 40
FAR = (58, 31, 50)
SHEARED = AFFINE + 0.0
SHEARED[1, 2] = 0.5
TURN = np.deg2rad(20)
TURNED = np.eye(4)
TURNED[1:3, 1:3] = [[np.cos(TURN), -np.sin(TURN)], [np.sin(TURN), np.cos(TURN)]]
OBLIQUE = TURNED @ np.diag([-0.8, -0.8, 2.5, 1])
TILTED = tuple(OBLIQUE[:3, :3] @ MARKED)


def image(sform=(AFFINE, 1), qform=(AFFINE, 1), *, unit="mm", array=None, kind="1"):
    """A CT of -1000 HU with 500 HU in the marked voxel."""
    if array is None:
        array = np.full(SHAPE, -1000, np.int16)
        array[MARKED] = 500
    made = getattr(nib, f"Nifti{kind}Image")(array, None)
    header = made.header
    header.set_qform(*qform)
    header.set_sform(*sform)
    header["sform_code"], header["qform_code"] = sform[1], qform[1]
    header.set_xyzt_units(unit)
    return made


def fours():
    made = image()
    return image(array=np.asarray(made.dataobj)[..., None, None])


def other_sides():
    made = image((AFFINE, 1), (AFFINE, 1))
    made.header["pixdim"][1:4] = 2, 2, 4
    return made


def long_quaternion():
    made = image()
    made.header["quatern_d"] = 1.0000005
    return made


def sloped():
    made = image()
    array = np.asarray(made.dataobj).astype(np.float32)
    made = image(array=array)
    made.set_data_dtype(np.int16)
    return made


def scaled(factor):
    return np.diag([factor, factor, factor, 1]) @ AFFINE


ROUNDED = OBLIQUE.round(3)
FILES = {  # the image, and where nibabel and SimpleITK see the voxel
    "codes 1 and 1": (image(), PLACE, PLACE),
    "codes 2 and 0": (image((AFFINE, 2), (MOVED, 0)), PLACE, PLACE),
    "codes 0 and 1": (image((MOVED, 0), (AFFINE, 1)), PLACE, PLACE),
    "codes 1 and 1, apart": (image((AFFINE, 1), (MOVED, 1)), PLACE, PLACE),
    "codes 2 and 1, apart": (image((AFFINE, 2), (MOVED, 1)), PLACE, FAR),
    "codes 2 and 2, apart": (image((AFFINE, 2), (MOVED, 2)), PLACE, FAR),
    "codes 0 and 0": (image((AFFINE, 0), (AFFINE, 0)), (2, -1, 0), (-2, -4, 9)),
    "sheared": (image((SHEARED, 1), (SHEARED, 0)), (18, -7.5, 10), None),
    "sheared, with qform": (image((SHEARED, 1), (AFFINE, 1)), (18, -7.5, 10), PLACE),
    "rounded": (image((ROUNDED, 1), (OBLIQUE, 1)), TILTED, TILTED),
    "rounded, without qform": (image((ROUNDED, 1), (OBLIQUE, 0)), TILTED, None),
    "metres": (
        image((scaled(1e-3), 1), (scaled(1e-3), 1), unit="meter"),
        PLACE,
        PLACE,
    ),
    "micrometres": (
        image((scaled(1e3), 2), (scaled(1e3), 0), unit="micron"),
        PLACE,
        PLACE,
    ),
    "unit not given": (image(unit="unknown"), PLACE, PLACE),
    "axes of one": (fours(), PLACE, PLACE),
    "sides are not the columns": (other_sides(), PLACE, (18, -9, 13)),
    "long quaternion": (long_quaternion(), PLACE, PLACE),
    "slope": (sloped(), PLACE, PLACE),
    "NIfTI-2": (image(kind="2"), PLACE, None),
}


def by_nibabel(path):
    """Return the place of the brightest voxel in mm, and its value."""
    read = nib.load(path)
    array = np.asarray(read.dataobj).reshape(read.shape[:3])
    factor = {"meter": 1e3, "micron": 1e-3}.get(read.header.get_xyzt_units()[0], 1)
    at = np.unravel_index(array.argmax(), array.shape)
    return nib.affines.apply_affine(read.affine, at) * factor, array.max()


def by_itk(path):
    """Return the same as SimpleITK sees it; None if it refuses the file."""
    try:
        read = sitk.ReadImage(str(path))
    except RuntimeError:
        return None
    while read.GetDimension() > 3:
        read = read[..., 0]
    array = sitk.GetArrayFromImage(read).transpose()
    at = np.unravel_index(array.argmax(), array.shape)
    place = np.array(read.TransformIndexToPhysicalPoint([int(i) for i in at]))
    return place * (-1, -1, 1), array.max()


@pytest.mark.parametrize("name", FILES)
def test_ct_and_labels_lie_in_one_place_in_every_reader(tmp_path, name):
    made, place, itk_place = FILES[name]
    nib.save(made, tmp_path / "ct.nii")
    if name == "long quaternion":  # nibabel writes another
        content = bytearray((tmp_path / "ct.nii").read_bytes())
        content[264:268] = struct.pack("<f", 1.0000005)
        (tmp_path / "ct.nii").write_bytes(bytes(content))
    ct = nifti.load_ct(tmp_path / "ct.nii")
    ours = np.unravel_index(ct.array.argmax(), ct.array.shape)
    at = nib.affines.apply_affine(ct.affine, ours)
    np.testing.assert_allclose(at, place, atol=0.01)
    assert ct.array[ours] == 500
    labels = (ct.array > 0).astype(np.uint8)
    nifti.save_labels(tmp_path / "labels.nii.gz", labels, like=ct)
    back = nifti.load_labels(tmp_path / "labels.nii.gz", on=ct)
    np.testing.assert_array_equal(back.array, labels)
    for file, value in (("ct.nii", 500), ("labels.nii.gz", 1)):
        at, found = by_nibabel(tmp_path / file)
        assert found == pytest.approx(value, abs=1e-3)
        np.testing.assert_allclose(at, place, atol=0.01)
        seen = by_itk(tmp_path / file)
        if name == "NIfTI-2" and value == 1:  # labels are NIfTI-1
            np.testing.assert_allclose(seen[0], place, atol=0.01)
            continue
        assert (seen is None) == (itk_place is None)
        if seen is not None:
            assert seen[1] == pytest.approx(value, abs=1e-3)
            np.testing.assert_allclose(seen[0], itk_place, atol=0.01)
    said = " ".join(ct.notes)
    apart = itk_place is not None and np.abs(np.subtract(place, itk_place)).max() > 0.1
    assert bool(apart) == ("from where nibabel does" in said)
    assert ("cannot open it or its labels" in said) == (
        itk_place is None and name != "NIfTI-2"
    )
    assert len(ct.notes) <= 1


CODES = list(itertools.product((0, 1, 2), repeat=2))


@pytest.mark.parametrize("codes", CODES)
def test_labels_keep_what_the_header_of_the_scan_says(tmp_path, codes):
    made = image((AFFINE, codes[0]), (MOVED, codes[1]), unit="meter")
    nib.save(made, tmp_path / "ct.nii.gz")
    ct = nifti.load_ct(tmp_path / "ct.nii.gz")
    nifti.save(tmp_path / "labels.nii.gz", ct.array, like=ct)
    one, two = (nib.load(tmp_path / f"{n}.nii.gz").header for n in ("ct", "labels"))
    for name, (form, code) in {
        "sform": (one.get_sform(), codes[0]),
        "qform": (one.get_qform(), codes[1]),
    }.items():
        assert two[f"{name}_code"] == code
        np.testing.assert_array_equal(getattr(two, f"get_{name}")(), form)
    assert two.get_zooms() == one.get_zooms()
    assert two.get_xyzt_units() == one.get_xyzt_units()


def test_a_qform_that_cannot_be_read_is_a_note(tmp_path):
    made = FILES["long quaternion"][0]
    made.header["quatern_d"] = 1.5
    nib.save(made, tmp_path / "ct.nii")
    (note,) = nifti.load_ct(tmp_path / "ct.nii").notes
    assert "qform cannot be read" in note and "the sform is taken" in note


@pytest.mark.parametrize("suffix", [".nii", ".nii.gz"])
def test_a_rounded_quaternion_alone_is_read(tmp_path, suffix):
    made = image((MOVED, 0), (AFFINE, 1))
    content = bytearray(made.to_bytes())
    content[264:268] = struct.pack("<f", 1.0000005)
    path, labels = tmp_path / f"ct{suffix}", tmp_path / "labels.nii.gz"
    path.write_bytes(gzip.compress(content) if suffix == ".nii.gz" else content)
    ct = nifti.load_ct(path)
    nifti.save_labels(labels, (ct.array > 0).astype(np.uint8), like=ct)
    assert not ct.notes
    for found in (by_itk(path), by_itk(labels), by_nibabel(labels)):
        np.testing.assert_allclose(found[0], PLACE, atol=1e-3)
    np.testing.assert_allclose(nifti.load_labels(labels, on=ct).affine, ct.affine)


@pytest.mark.parametrize("affine", [AFFINE, OBLIQUE, SHEARED])
def test_labels_of_an_array_open_in_itk_unless_sheared(tmp_path, affine):
    hu = np.full(SHAPE, -1000, np.int16)
    hu[MARKED] = 500
    scan = nifti.from_array(hu, affine)
    nifti.save_labels(tmp_path / "l.nii.gz", (scan.array > 0).astype("u1"), like=scan)
    place = nib.affines.apply_affine(affine, MARKED)
    np.testing.assert_allclose(by_nibabel(tmp_path / "l.nii.gz")[0], place, atol=1e-4)
    if affine is SHEARED:
        assert by_itk(tmp_path / "l.nii.gz") is None
        assert "cannot open NIfTI files of such labels" in scan.notes[0]
    else:
        np.testing.assert_allclose(by_itk(tmp_path / "l.nii.gz")[0], place, atol=1e-3)
        assert not scan.notes
