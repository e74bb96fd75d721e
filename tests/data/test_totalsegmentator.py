import re

import nibabel as nib
import numpy as np
import pytest

from swinsmt_jax import checks, labels
from swinsmt_jax.data import meta
from swinsmt_jax.data.case import load_case
from swinsmt_jax.data.layouts import totalsegmentator


def only_case(root, split="train"):
    (case,) = totalsegmentator.find_cases(root, split=split)
    return case


def test_masks_and_label_file_give_the_same_sample(root, volumes):
    ct, label = volumes
    for split in ("train", "test"):
        sample = load_case(only_case(root, split))
        np.testing.assert_array_equal(sample.image, ct)
        np.testing.assert_array_equal(sample.label, label)
        assert (sample.image.dtype, sample.label.dtype) == (np.int16, np.uint8)
        assert sample.name == only_case(root, split).name


def test_where_masks_overlap_the_later_class_wins(root, volumes, write):
    ones = np.ones(volumes[0].shape, np.uint8)
    for name in ("costal_cartilages", "liver", "aorta"):
        write(root / f"s0001/segmentations/{name}.nii.gz", ones)
    sample = load_case(only_case(root))
    assert np.all(sample.label == labels.CLASS_IDS["costal_cartilages"])


def test_masks_in_another_orientation_than_the_ct_are_brought_to_it(root, volumes):
    path = root / "s0001/ct.nii.gz"
    image = nib.load(path)
    flipped = image.as_reoriented(np.array([[1, -1], [0, -1], [2, 1]]))
    nib.save(nib.Nifti1Image(np.asarray(flipped.dataobj), flipped.affine), path)
    sample = load_case(only_case(root))
    np.testing.assert_array_equal(sample.image, volumes[0])
    np.testing.assert_array_equal(sample.label, volumes[1])


def test_missing_mask_is_named(root):
    (root / "s0001/segmentations/rib_left_3.nii.gz").unlink()
    with pytest.raises(checks.UserError, match="lacks 1 of 117 masks: rib_left_3"):
        load_case(only_case(root))


def test_unknown_class_is_named_with_its_neighbour(root, write):
    write(root / "s0001/segmentations/livr.nii.gz", np.zeros((2, 2, 2), np.uint8))
    (note,) = load_case(only_case(root, "train")).notes
    assert re.search(r"livr\.nii\.gz is not a mask of any class .*mean 'liver'", note)
    (root / "s0001/segmentations/liver.nii.gz").unlink()
    with pytest.raises(checks.UserError, match=r"livr\.nii\.gz.*Did you mean 'liver'"):
        load_case(only_case(root))


@pytest.mark.parametrize(
    ("split", "file"),
    [("train", "s0001/segmentations/liver"), ("test", "s0002/segmentations")],
)
def test_segmentation_off_the_grid_of_the_ct_is_refused(root, split, file, write):
    path = root / f"{file}.nii.gz"
    image = nib.load(path)
    array, affine = np.asarray(image.dataobj), image.affine
    case = only_case(root, split)
    write(path, np.pad(array, 1)[:, 1:-2, 1:-1], affine)
    with pytest.raises(checks.UserError, match=r"shape \(14, 9, 8\).*\(12, 10, 8\)"):
        load_case(case)
    moved = affine.copy()
    moved[0, 3] += 1.0  # half a voxel
    write(path, array, moved)
    with pytest.raises(checks.UserError, match=r"affine of .* 0\.50 voxels away"):
        load_case(case)
    stretched = affine @ np.diag([1, 1.02, 1, 1])  # 0.18 voxels at the far corner
    write(path, array, stretched)
    with pytest.raises(checks.UserError, match=r"0\.18 voxels away"):
        load_case(case)
    rounded = affine.copy()
    rounded[1, 3] += 1e-3
    write(path, array, rounded)
    load_case(case)


def test_labels_of_other_class_maps_are_refused(root, volumes, write):
    label = volumes[1].copy()
    label[0, 0, 0] = 130
    write(root / "s0002/segmentations.nii.gz", label)
    with pytest.raises(checks.UserError, match=r"0 to 130.*class map v2.*0 to 117"):
        load_case(only_case(root, "test"))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("image_id;split\n", "lists no case of the split 'train'"),
        ("image_id,split\ns0001,train\n", r"columns \['image_id,split'\]"),
        ("image_id;age\ns0001;5\n", "needs 'split'"),
        ("image_id;split\n;\n../x;train\n", "line 3 .*'../x'.*plain name"),
        ("image_id;split\n..;train\n", "plain name"),
        ("image_id;split\n;train\n", "plain name"),
        (
            "image_id;split\ns0001;train\ns0001;test\n",
            "line 3 .*more than once",
        ),
        ("image_id;split\ns0001;trian\n", "'trian'.*Did you mean 'train'"),
        ("image_id;split\ns0009;train\n", "s0009.*finish the download"),
        ("", "needs 'image_id'"),
    ],
)
def test_bad_meta_is_refused(root, text, words):
    (root / "meta.csv").write_text(text)
    with pytest.raises(checks.UserError, match=words):
        totalsegmentator.find_cases(root, split="train")


def test_missing_parts_of_the_layout_are_named(root):
    with pytest.raises(checks.UserError, match="split is 'tests'.*Did you mean 'test'"):
        totalsegmentator.find_cases(root, split="tests")
    with pytest.raises(checks.UserError, match="1 of 'train', 0 of 'val', 1 of 'test'"):
        totalsegmentator.find_cases(root, split="val")
    (root / "s0002/segmentations.nii.gz").unlink()
    with pytest.raises(checks.UserError, match="'s0002' has neither"):
        totalsegmentator.find_cases(root, split="test")
    (root / "meta.csv").unlink()
    with pytest.raises(checks.UserError, match=r"meta\.csv does not exist"):
        totalsegmentator.find_cases(root, split="test")
    with pytest.raises(checks.UserError, match="zenodo.org/records/10047292"):
        totalsegmentator.find_cases(root / "none", split="test")


def test_rows_of_separators_are_passed_over_and_further_fields_kept(root):
    file = root / "meta.csv"
    file.write_text("image_id;split\n;;\ns0001;train;;\n ; \ns0002;test;a note\n")
    assert meta.read(root) == {"s0001": "train", "s0002": "test"}
    meta.add(root, {"s0003": "val"})
    rows = ["image_id;split", "s0001;train", "s0002;test;a note", "s0003;val"]
    assert file.read_text(encoding="utf-8-sig").splitlines() == rows


def test_adding_to_meta_keeps_the_other_columns_and_rows(root):
    meta.add(root, {"s0003": "val", "s0002": "train"})
    text = (root / "meta.csv").read_text(encoding="utf-8-sig")
    rows = ["image_id;age;split", "s0001;50;train", "s0003;;val", "s0002;;train"]
    assert text.split() == rows
    assert (root / "meta.csv").read_bytes().startswith(b"\xef\xbb\xbf")
