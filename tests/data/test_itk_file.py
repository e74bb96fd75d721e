"""Scans and labels in NRRD and MetaImage files, placed as SimpleITK places them."""

import nibabel as nib
import numpy as np
import pytest

from swinsmt_jax import save
from swinsmt_jax.checks import UserError
from swinsmt_jax.class_map import ClassMap
from swinsmt_jax.data import label_table, nifti
from swinsmt_jax.inference.scans import find_scans

sitk = pytest.importorskip("SimpleITK")
CLASSES = ClassMap(("background", "spleen", "liver"))
OBLIQUE = np.array([[0.8, -0.6, 0], [0.6, 0.8, 0], [0, 0, -1.0]])


def write(path, array, direction=OBLIQUE, *, compressed=False):
    image = sitk.GetImageFromArray(np.ascontiguousarray(array.T))
    image.SetSpacing((0.8, 0.9, 2.5))
    image.SetOrigin((-11.0, 7.0, 30.0))
    image.SetDirection(direction.ravel().tolist())
    sitk.WriteImage(image, str(path), compressed)
    return path


@pytest.mark.parametrize("suffix", [".nrrd", ".mha", ".mhd", ".NRRD"])
def test_a_volume_lies_where_simpleitk_says(tmp_path, rng, suffix):
    hu = rng.integers(-1000, 1000, (6, 8, 5)).astype(np.int16)
    found = nifti.load_ct(
        write(tmp_path / f"ct{suffix.lower()}", hu).rename(tmp_path / f"ct{suffix}")
        if suffix != ".mhd"
        else write(tmp_path / "ct.mhd", hu)
    )
    write(tmp_path / "same.nii.gz", hu)
    expected = nifti.load_ct(tmp_path / "same.nii.gz")
    np.testing.assert_array_equal(found.array, expected.array)
    np.testing.assert_allclose(found.affine, expected.affine, atol=1e-4)
    assert not found.notes


@pytest.mark.parametrize(
    "space",
    ["left-posterior-superior", "right-anterior-superior", "left-anterior-superior"],
)
def test_the_space_of_nrrd_is_heeded(tmp_path, space):
    path = tmp_path / "ct.nrrd"
    voxels = np.arange(24, dtype="<i2")
    path.write_bytes(
        f"NRRD0004\ntype: short\ndimension: 3\nspace: {space}\nsizes: 4 3 2\n"
        "space directions: (1,0,0) (0,2,0) (0,0,3)\nkinds: domain domain domain\n"
        "endian: little\nencoding: raw\nspace origin: (5,6,7)\n\n".encode()
        + voxels.tobytes()
    )
    left, back = (
        1 if name.startswith(("right", "anterior")) else -1
        for name in space.split("-")[:2]
    )
    affine = nifti.load_ct(path).source_affine
    np.testing.assert_allclose(
        affine,
        np.diag([left, back, 1, 1])
        @ [[1, 0, 0, 5], [0, 2, 0, 6], [0, 0, 3, 7], [0, 0, 0, 1]],
    )


@pytest.mark.parametrize("suffix", [".nrrd", ".mha", ".nii.gz"])
@pytest.mark.parametrize("scan", [".nrrd", ".mha", ".nii.gz"])
def test_labels_lie_on_their_scan_and_keep_their_names(tmp_path, rng, scan, suffix):
    like = write(tmp_path / f"ct{scan}", np.zeros((6, 8, 5), np.int16))
    labels = rng.integers(0, 3, (6, 8, 5)).astype(np.uint8)
    path = tmp_path / f"labels{suffix}"
    save(path, labels, like=like, names={1: "liver", 2: "spleen"})
    image = sitk.ReadImage(str(path))
    np.testing.assert_array_equal(sitk.GetArrayFromImage(image).T, labels)
    np.testing.assert_allclose(image.GetOrigin(), (-11.0, 7.0, 30.0), atol=1e-4)
    np.testing.assert_allclose(image.GetDirection(), OBLIQUE.ravel(), atol=1e-4)
    read = nifti.load_labels(path, classes=CLASSES, on=nifti.load_ct(like))
    exchanged = np.array([0, 2, 1], np.uint8)[labels]  # ids by name
    np.testing.assert_array_equal(nifti.in_file_axes(read.array, read), exchanged)


def test_what_cannot_be_read_or_written_is_refused(tmp_path):
    (tmp_path / "bad.nrrd").write_text("NRRD9\n")
    with pytest.raises(UserError, match="bad.nrrd cannot be read as NRRD or MetaImage"):
        nifti.load_ct(tmp_path / "bad.nrrd")
    colour = sitk.Image((4, 3, 2), sitk.sitkVectorUInt8, 3)
    sitk.WriteImage(colour, str(tmp_path / "colour.mha"))
    with pytest.raises(UserError, match="colour.mha has 3 values in each voxel"):
        nifti.load_ct(tmp_path / "colour.mha")
    whole = write(tmp_path / "cut.mha", np.zeros((9, 9, 9), np.int16))
    whole.write_bytes(whole.read_bytes()[:-500])
    with pytest.raises(UserError, match="cut.mha is truncated or corrupt"):
        nifti.load_ct(whole)
    noise = np.random.default_rng(0).integers(-1000, 1000, (20, 20, 20))
    for name in ("bits.mha", "bits.mhd"):  # ITK itself reads on
        file = write(tmp_path / name, noise.astype(np.int16), compressed=True)
        nifti.load_ct(file)
        file = file if name == "bits.mha" else file.with_suffix(".zraw")
        content = bytearray(file.read_bytes())
        content[-len(content) // 4] ^= 4
        file.write_bytes(content)
        with pytest.raises(UserError, match=f"{name} is truncated or corrupt"):
            nifti.load_ct(tmp_path / name)
    sheared = np.eye(4)
    sheared[0, 1] = 0.3
    nib.save(
        nib.Nifti1Image(np.zeros((3, 3, 3), np.int16), sheared), tmp_path / "s.nii"
    )
    with pytest.raises(UserError, match="not at right angles.*--format=nii.gz"):
        save(
            tmp_path / "l.nrrd", np.zeros((3, 3, 3), np.uint8), like=tmp_path / "s.nii"
        )
    assert not (tmp_path / "l.nrrd").exists()


def test_folders_are_searched_for_them(tmp_path):
    for name in ("a.nrrd", "b.mha", "c.nii"):
        write(tmp_path / name, np.zeros((3, 3, 3), np.int16), np.eye(3))
    assert list(find_scans([tmp_path])) == ["a", "b", "c"]
    assert label_table.read(label_table.xml({1: "a"})) == {1: "a"}
