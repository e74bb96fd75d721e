import gzip
import itertools
import re
from dataclasses import replace

import nibabel as nib
import numpy as np
import pytest
from nibabel import orientations

from swinsmt_jax import checks
from swinsmt_jax.data import nifti, resampling
from swinsmt_jax.data.volume import spacing_of

SHAPE = (5, 6, 7)
AFFINE = np.array([[2.0, 0, 0, -5], [0, 2, 0, 7], [0, 0, 3, 11], [0, 0, 0, 1]])
OBLIQUE = AFFINE @ np.array(
    [[0.96, 0.28, 0, 0], [-0.28, 0.96, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1.0]]
)


def all_orientations():
    for order in itertools.permutations(range(3)):
        for signs in itertools.product((1, -1), repeat=3):
            yield np.stack([order, signs], axis=1).astype(float)


def reoriented(array, affine, ornt):
    wanted = orientations.ornt_transform(orientations.axcodes2ornt("RAS"), ornt)
    turned = orientations.apply_orientation(array, wanted)
    return turned, affine @ orientations.inv_ornt_aff(wanted, array.shape)


@pytest.mark.parametrize("affine", [AFFINE, OBLIQUE], ids=["straight", "oblique"])
def test_every_orientation_loads_as_the_same_ras_volume(tmp_path, rng, affine, write):
    array = rng.integers(0, 118, SHAPE).astype(np.int16)
    for i, ornt in enumerate(all_orientations()):
        path = write(tmp_path / f"{i}.nii", *reoriented(array, affine, ornt))
        volume = nifti.load_ct(path)
        np.testing.assert_array_equal(volume.array, array)
        np.testing.assert_allclose(volume.affine, affine, atol=1e-5)
        np.testing.assert_allclose(volume.spacing, (2, 2, 3), atol=1e-5)


def test_labels_are_written_back_in_the_orientation_of_their_file(tmp_path, rng, write):
    array = rng.integers(0, 118, SHAPE).astype(np.uint8)
    for i, ornt in enumerate(all_orientations()):
        stored, affine = reoriented(array, AFFINE, ornt)
        source = write(tmp_path / "source.nii.gz", stored, affine)
        like = nifti.load_labels(source)
        out = tmp_path / f"out{i}.nii.gz"
        nifti.save_labels(out, like.array, like=like)
        image = nib.load(out)
        np.testing.assert_array_equal(np.asarray(image.dataobj), stored)
        np.testing.assert_allclose(image.affine, affine)
        assert image.get_data_dtype() == np.uint8
    assert not [p for p in tmp_path.iterdir() if p.name.startswith(".")]


def test_resampled_labels_return_to_the_grid_of_their_file(tmp_path, write):
    array = np.kron(np.arange(27).reshape(3, 3, 3), np.ones((4, 4, 4))).astype(np.uint8)
    affine = np.diag([-1.0, 1, 1, 1])
    like = nifti.load_labels(write(tmp_path / "fine.nii.gz", array, affine))
    coarse, coarse_affine = resampling.resample(
        like.array, like.affine, spacing=2, order=0
    )
    assert coarse.shape == (6, 6, 6)
    like = replace(like, array=coarse, affine=coarse_affine)
    nifti.save_labels(tmp_path / "back.nii.gz", coarse, like=like)
    back = nib.load(tmp_path / "back.nii.gz")
    np.testing.assert_array_equal(np.asarray(back.dataobj), array)


def test_resampling_keeps_every_voxel_at_its_place_in_the_world():
    """A linear function of world coordinates stays that function, away from edges."""
    affine = AFFINE @ np.diag([1, -1, 1, 1.0])
    index = np.indices((20, 24, 16)).reshape(3, -1)
    world = affine[:3, :3] @ index + affine[:3, 3:]
    ramp = (world[0] + 2 * world[1] - world[2]).reshape(20, 24, 16).astype(np.float32)
    for spacing in (1.5, 2.0, 3.3):
        new, new_affine = resampling.resample(ramp, affine, spacing=spacing, order=1)
        np.testing.assert_allclose(spacing_of(new_affine), spacing)
        index = np.indices(new.shape).reshape(3, -1)
        world = new_affine[:3, :3] @ index + new_affine[:3, 3:]
        expected = (world[0] + 2 * world[1] - world[2]).reshape(new.shape)
        inner = (slice(2, -2),) * 3
        np.testing.assert_allclose(new[inner], expected[inner], atol=1e-3)
        behind = np.array(new.shape) * spacing - (40, 48, 48)
        assert np.all(behind > -1e-4) and np.all(behind < spacing)


def test_resampling_to_the_own_spacing_changes_nothing():
    array = np.zeros((3, 3, 3), np.uint8)
    assert (
        resampling.resample(array, np.diag([2.0, 2, 2, 1]), spacing=2, order=0)[0]
        is array
    )


def test_slope_and_intercept_of_the_file_give_hu(tmp_path, write):
    path = write(tmp_path / "ct.nii", np.full((2, 2, 2), 2000, np.int16))
    content = bytearray(path.read_bytes())
    content[112:120] = np.array([0.5, -1024], "<f4").tobytes()  # scl_slope, scl_inter
    path.write_bytes(content)
    assert np.all(nifti.load_ct(path).array == -24)


def test_ct_of_floats_is_rounded_and_kept_in_range(tmp_path, write):
    array = np.array([7.6, -0.4, 1e6, -1e6], np.float32).reshape(1, 2, 2)
    volume = nifti.load_ct(write(tmp_path / "ct.nii", array))
    assert volume.array.dtype == np.int16
    assert volume.array.ravel().tolist() == [8, 0, 32767, -32768]


def nan_voxel():
    array = np.zeros(SHAPE, np.float32)
    array[1, 2, 3] = np.nan
    array[0, 0, 0] = np.inf
    return array


RGB = np.zeros(SHAPE, np.dtype([("R", "u1"), ("G", "u1"), ("B", "u1")]))


@pytest.mark.parametrize(
    ("array", "affine", "words"),
    [
        (np.zeros((4, 4, 4, 2), np.int16), AFFINE, r"\(4, 4, 4, 2\).*must be 3-D"),
        (np.zeros((4, 4), np.int16), AFFINE, "must be 3-D"),
        (nan_voxel(), AFFINE, "2 voxels that are NaN or infinite.*-1024"),
        (RGB, AFFINE, "RGB"),
    ],
    ids=["4-D", "2-D", "NaN", "RGB"],
)
def test_bad_volumes_are_refused_by_name(tmp_path, array, affine, words, write):
    path = write(tmp_path / "bad.nii.gz", array, affine)
    for load in (nifti.load_ct, nifti.load_labels, nifti.load_mask):
        with pytest.raises(checks.UserError, match=rf"(?s)bad\.nii\.gz.*{words}"):
            load(path)


@pytest.mark.parametrize("shape", [(3, 3), (3, 4), (4,)])
def test_an_affine_of_another_shape_is_refused(shape):
    with pytest.raises(checks.UserError, match=r"affine of the array has shape \("):
        nifti.from_array(np.zeros(SHAPE, np.int16), np.ones(shape))


def test_affine_that_cannot_be_inverted_is_refused(tmp_path, write):
    for bad in (0.0, np.nan):
        path = write(tmp_path / "ct.nii", np.zeros(SHAPE, np.int16))
        content = bytearray(path.read_bytes())
        content[280:296] = np.full(4, bad, "<f4").tobytes()  # srow_x
        path.write_bytes(content)
        with pytest.raises(checks.UserError, match="cannot be inverted.*sform"):
            nifti.load_ct(path)


def test_truncated_and_foreign_files_are_refused_by_name(tmp_path, rng, write):
    noise = rng.integers(-999, 999, (20, 20, 20)).astype(np.int16)
    path = write(tmp_path / "ct.nii.gz", noise)
    whole = path.read_bytes()
    for keep in (len(whole) // 2, 200, 15, 0):
        path.write_bytes(whole[:keep])
        with pytest.raises(checks.UserError, match=r"ct\.nii\.gz is (trunc|not a NIf)"):
            nifti.load_ct(path)
    path.write_bytes(whole[:500] + bytes(100) + whole[600:])
    with pytest.raises(checks.UserError, match="copy or download it again"):
        nifti.load_ct(path)
    path.write_bytes(b"hello")
    with pytest.raises(checks.UserError, match=r"ct\.nii\.gz"):
        nifti.load_ct(path)
    with pytest.raises(checks.UserError, match="none.nii.gz does not exist"):
        nifti.load_ct(tmp_path / "none.nii.gz")


def test_damage_that_only_the_checksum_shows_is_refused(tmp_path, rng, write):
    path = tmp_path / "labels.nii.gz"
    noise = rng.integers(0, 2, (20, 20, 20)).astype(np.uint8)
    content = write(tmp_path / "plain.nii", noise).read_bytes()
    whole = gzip.compress(content, 0)  # stored, so that a flipped bit is a wrong voxel
    flipped, no_checksum = bytearray(whole), bytearray(whole)
    flipped[-3000] ^= 1
    no_checksum[-8:-4] = bytes(4)
    for bad in (flipped, no_checksum, whole[:-8], whole[:-1]):
        path.write_bytes(bad)
        for load in (nifti.load_ct, nifti.load_labels, nifti.load_mask):
            with pytest.raises(checks.UserError, match=r"labels\.nii\.gz is truncated"):
                load(path)
    path.write_bytes(whole)
    np.testing.assert_array_equal(nifti.load_labels(path).array, noise)
    path.write_bytes(gzip.compress(content + bytes(2**24), 1))
    with pytest.raises(checks.UserError, match="bytes follow the voxels"):
        nifti.load_labels(path)


@pytest.mark.parametrize("suffix", [".nii", ".nii.gz"])
@pytest.mark.parametrize(
    ("at", "value", "words"),
    [
        (42, np.array([3000, 3000, 400], "<i2"), "too few for the 7200000352 of the"),
        (
            42,
            np.array([30000, 30000, 30000], "<i2"),
            "27000000000000 voxels, but a scan",
        ),
        (42, np.array([-5, 6, 7], "<i2"), "bad.nii"),
        (108, np.array([np.inf], "<f4"), "truncated or corrupt .*infinity"),
        (108, np.array([-400], "<f4"), "bad.nii"),
        (70, np.array([9999], "<i2"), "is a NIfTI file with a bad header .*9999"),
    ],
)
def test_absurd_headers_are_refused_by_name(tmp_path, write, suffix, at, value, words):
    path = write(tmp_path / "bad.nii", np.zeros(SHAPE, np.int16))
    content = bytearray(path.read_bytes())
    content[at : at + value.nbytes] = value.tobytes()
    path = tmp_path / f"bad{suffix}"
    path.write_bytes(gzip.compress(content) if suffix == ".nii.gz" else content)
    with pytest.raises(checks.UserError, match=words) as told:
        nifti.load_ct(path)
    assert "\n" not in str(told.value)
    assert "truncated or corrupt (" not in str(told.value) or at == 108


def test_a_grid_is_compared_before_voxels_are_read(tmp_path, rng, write):
    ct = nifti.load_ct(write(tmp_path / "ct.nii.gz", np.zeros(SHAPE, np.int16)))
    noise = rng.integers(0, 2, (30, 6, 70), np.uint8)
    path = write(tmp_path / "mask.nii.gz", noise)
    path.write_bytes(path.read_bytes()[:-8])
    for load in (nifti.load_mask, nifti.load_labels):
        with pytest.raises(checks.UserError, match=r"has shape \(30, 6, 70\)"):
            load(path, on=ct)


def test_two_orientations_or_none_are_noted(tmp_path):
    axis = np.ones(3) / np.sqrt(3)  # turns that leave two opposite corners in place
    cross = np.cross(np.eye(3), axis)
    turn = np.eye(4)
    turn[:3, :3] = np.eye(3) + np.sin(0.5) * cross + (1 - np.cos(0.5)) * cross @ cross
    image = nib.Nifti1Image(np.zeros((8, 8, 8), np.int16), np.eye(4))
    for qform, code, words in (
        (turn, 1, r"disagree by up to \d\.\d mm"),
        (np.eye(4), 1, None),
        (np.eye(4), 0, None),
    ):
        image.set_qform(qform, code)
        nib.save(image, tmp_path / "ct.nii")
        notes = nifti.load_ct(tmp_path / "ct.nii").notes
        assert len(notes) == (words is not None)
        assert not notes or re.search(words, notes[0])
    content = bytearray(image.to_bytes())
    content[252:256] = bytes(4)  # qform_code and sform_code
    (tmp_path / "ct.nii").write_bytes(content)
    (note,) = nifti.load_ct(tmp_path / "ct.nii").notes
    assert "code 0" in note and "orientation is unknown" in note


@pytest.mark.parametrize("ratio", [2, 4, 3, 2.5, 0.5])
def test_resampled_labels_neither_move_nor_grow(rng, ratio):
    """Of boxes at any place, also where borders halve new voxels."""
    moved, grown = [], []
    for _ in range(30):
        label = np.zeros((60, 60, 60), np.uint8)
        for number, x in ((1, 0), (2, 30)):
            first = rng.integers(3, 8, 3) + (x, 0, 0)
            end = first + rng.integers(14, 21, 3)
            label[tuple(slice(a, b) for a, b in zip(first, end, strict=True))] = number
        new, affine = resampling.resample(label, np.eye(4), spacing=ratio, order=0)
        assert set(np.unique(new)) == {0, 1, 2}
        for number in (1, 2):
            before, after = (np.argwhere(a == number) for a in (label, new))
            place = after.mean(0) @ affine[:3, :3].T + affine[:3, 3]
            moved.append(place - before.mean(0))
            grown.append(len(after) * ratio**3 / len(before))
    assert np.abs(np.mean(moved, axis=0)).max() < 0.12 * max(1, ratio / 2)
    assert abs(np.mean(grown) - 1) < 0.1  # corners are lost


def test_labels_at_a_border_halfway_are_shared(tmp_path):
    label = np.zeros((8, 8, 8), np.uint8)
    label[3:] = 1
    new, _ = resampling.resample(label, np.eye(4), spacing=2, order=0)
    assert (new[0] == 0).all() and (new[2:] == 1).all()
    assert new[1].sum() == 8  # of 16
    label[:] = 0
    label[6:, 6:, 6:] = 5  # the third voxel has 1.2 of the old ones, and then ends
    new, _ = resampling.resample(label, np.eye(4), spacing=3.4, order=0)
    assert new.shape == (3, 3, 3) and new[2, 2, 2] == 5 and new.sum() == 5


def test_resampling_to_absurd_size_is_refused():
    array = np.zeros((6, 6, 6), np.int16)
    for order in (0, 1):
        with pytest.raises(checks.UserError, match="900 mm would have .3600, 3600"):
            affine = np.diag([900.0, 900, 900, 1])
            resampling.resample(array, affine, spacing=1.5, order=order)


@pytest.mark.parametrize(
    ("value", "words"), [(118, "0 to 118"), (-1, "-1"), (0.5, "not whole numbers")]
)
def test_values_that_are_no_label_ids_are_refused(tmp_path, value, words, write):
    array = np.zeros(SHAPE, np.float32 if value == 0.5 else np.int16)
    array[0, 0, 0] = value
    path = write(tmp_path / "labels.nii.gz", array)
    with pytest.raises(checks.UserError, match=words):
        nifti.load_labels(path)


def test_real_scan_is_read_in_place(shared):
    folder = shared / "data/totalsegmentator_example"
    ct = nifti.load_ct(folder / "example_ct.nii.gz")
    label = nifti.load_labels(folder / "example_seg.nii.gz")
    nifti.require_same_grid(label, ct)
    assert ct.array.shape == (122, 101, 112)
    assert ct.array.min() == -1207
    np.testing.assert_allclose(ct.spacing, 3, atol=1e-4)
    assert len(np.unique(label.array)) == 62
    right = {i: np.argwhere(label.array == i)[:, 0].mean() for i in (1, 5, 2, 3)}
    assert right[5] > right[1]  # the liver lies to the right of the spleen
    assert right[2] > right[3]


def body(rng):
    """HU of a cube of soft tissue in air."""
    hu = np.full((16, 16, 16), -1000, np.int16)
    hu[3:13, 3:13, 3:13] = rng.integers(-100, 300, (10, 10, 10))
    return hu


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda hu: np.float32((hu + 1000) / 1300), "from 0 to 0.99"),
        (lambda hu: np.float32((hu + 350) / 650), "from -1 to 0.9"),
        (lambda hu: np.uint16(hu + 1024), "from 24 to 1323"),
        (lambda hu: np.int16(hu - 1024), "from -2024 to -725"),
        (lambda hu: np.where(hu == -1000, -2000, hu + 1024), "from -2000 to 1323"),
        (lambda hu: np.uint8((hu + 1000) // 6), "from 0 to 216"),
    ],
    ids=["0 to 1", "-1 to 1", "offset", "offset twice", "offset, padded", "8 bits"],
)
def test_values_unlike_hounsfield_units_are_told(
    tmp_path, rng, write, caplog, change, words
):
    array = change(body(rng))
    array = array if array.dtype.kind != "i" else array.astype(np.int16)
    path = write(tmp_path / "ct.nii", array)
    (note,) = nifti.load_ct(path).notes
    assert words in note and "unlike Hounsfield units" in note and "ct.nii" in note
    assert nifti.from_array(array, np.eye(4)).notes and note in caplog.text
    assert not nifti.load_ct(path, modality="MR").notes
    caplog.clear()
    nifti.load_ct(path)  # as training on a raw dataset does for each crop
    assert not caplog.text


def test_hounsfield_units_of_any_field_of_view_are_left_in_peace(tmp_path, rng, write):
    hu = body(rng)
    padded, cropped = hu.copy(), hu[3:13, 3:13, 3:13]
    padded[0] = -3024
    metal = hu.copy()
    metal[5:9, 5:9, 5:9] = 3071
    for array in (hu, padded, cropped, metal, np.clip(hu, -160, 240), 0 * hu):
        assert not nifti.load_ct(write(tmp_path / "ct.nii", array)).notes


def test_labels_that_were_cut_to_a_box_are_put_in_place(tmp_path, rng, write):
    array = np.zeros(SHAPE, np.uint8)
    array[1:4, 2:5, 3:6] = rng.integers(1, 3, (3, 3, 3))
    ct = nifti.load_ct(write(tmp_path / "ct.nii", np.zeros(SHAPE, np.int16), OBLIQUE))
    place = OBLIQUE.copy()
    place[:3, 3] = (OBLIQUE @ (1, 2, 3, 1))[:3]
    for ornt in all_orientations():
        path = write(tmp_path / "x.nii", *reoriented(array[1:4, 2:5, 3:6], place, ornt))
        volume = nifti.load_labels(path, on=ct)
        np.testing.assert_array_equal(volume.array, array)
        (note,) = volume.notes
        assert "has (3, 3, 3) of the (5, 6, 7) voxels of" in note
    write(path, (array == 1).astype(np.uint8)[1:4, 2:5, 3:6], place)
    np.testing.assert_array_equal(nifti.load_mask(path, on=ct).array, array == 1)
    for step in ((0.5, 0, 0), (3, 0, 0), (-2, 0, 0)):  # off the grid, and outside
        moved = place.copy()
        moved[:3, 3] = (place @ (*step, 1))[:3]
        write(path, array[1:4, 2:5, 3:6], moved)
        with pytest.raises(checks.UserError, match="must lie on the voxel grid"):
            nifti.load_labels(path, on=ct)


def test_one_volume_of_four_axes_and_names_in_capitals_are_read(tmp_path, rng, write):
    array = rng.integers(-9, 9, SHAPE).astype(np.int16)
    for name, stored in (("a.nii", array[..., None]), ("B.NII.GZ", array)):
        volume = nifti.load_ct(write(tmp_path / name, stored, AFFINE))
        np.testing.assert_array_equal(volume.array, array)
    volume = nifti.from_array(array[..., None, None], AFFINE.tolist())
    np.testing.assert_array_equal(volume.array, array)


@pytest.mark.parametrize(
    ("hu", "affine", "words"),
    [
        (np.zeros(SHAPE), np.eye(4)[:3], r"affine .* has shape \(3, 4\), but must be"),
        (np.zeros(SHAPE), None, r"affine .* has shape \(\), but must be \[4, 4\]"),
        (np.zeros(SHAPE), "RAS", "cannot be read as numbers"),
        ([[1], [1, 2]], np.eye(4), "cannot be read as numbers"),
        (np.zeros((*SHAPE, 2)), np.eye(4), "must be 3-D"),
        (np.full(SHAPE, np.nan), np.eye(4), "210 voxels that are NaN"),
        (np.full(SHAPE, "x"), np.eye(4), "one real number a voxel"),
    ],
)
def test_arrays_that_are_no_scan_are_refused(hu, affine, words):
    with pytest.raises(checks.UserError, match=words):
        nifti.from_array(hu, affine)


def test_an_intercept_of_nan_is_a_bad_header(tmp_path, write):
    path = write(tmp_path / "x.nii", np.zeros(SHAPE, np.int16))
    content = bytearray(path.read_bytes())
    content[112:120] = np.array([1, np.nan], "<f4").tobytes()  # scl_slope, scl_inter
    path.write_bytes(content)
    with pytest.raises(checks.UserError, match="bad header .*invalid intercept nan"):
        nifti.load_ct(path)
