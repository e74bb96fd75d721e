"""Structures thinner than a voxel: which rule keeps them, and who says what is lost."""

import json

import nibabel as nib
import numpy as np
import pytest
from scipy import ndimage

from swinsmt_jax import checks
from swinsmt_jax.config import DataConfig
from swinsmt_jax.data import meta, pipeline, preprocess, resampling, store, store_report

WHOLE = np.ones((3, 3, 3))
VESSEL, ORGAN = 52, 5


@pytest.fixture
def source(tmp_path):
    """Two cases with a vessel of 1 mm in an organ; in one a vessel of 6 mm too."""
    root = tmp_path / "source"
    for i, split in enumerate(("train", "val")):
        hu = np.full((40, 40, 40), -1000, np.int16)
        hu[4:36, 4:36, 4:36] = 40
        label = np.zeros(hu.shape, np.uint8)
        label[8:32, 8:34, 8:34] = ORGAN
        label[8:32, 11 + i, 14 + i] = VESSEL
        if i:
            label[8:32, 20:26, 20:26] = VESSEL
        folder = root / f"s{i}"
        folder.mkdir(parents=True)
        for array, name in ((hu, "ct"), (label, "segmentations")):
            nib.save(nib.Nifti1Image(array, np.eye(4)), folder / f"{name}.nii.gz")
        meta.add(root, {folder.name: split})
    return root


def test_a_class_that_is_lost_is_named(source, tmp_path, caplog):
    root = tmp_path / "store"
    assert preprocess.preprocess(source, root, spacing=1.5) == {}
    (told,) = [r.getMessage() for r in caplog.records if "no voxel" in r.getMessage()]
    assert "case 's0' keeps no voxel of 1 classes" in told and "aorta (24)" in told
    assert "1 lack classes that their files have" in store_report.write(root)
    report = json.loads((root / "report.json").read_text())
    assert report["lost"] == {"s0": {"aorta": 24}}
    assert "<b>s0</b>: aorta (24 voxels)" in (root / "report.html").read_text()


def test_training_from_the_dataset_names_it_once(source, caplog):
    config = DataConfig(
        str(source), (16, 16, 16), batch_size=2, spacing=1.5, num_threads=1
    )
    cases = pipeline.find_cases(config, split="train")
    stream = pipeline.training_batches(config, cases, seed=0)
    for _ in range(3):
        next(stream)
    stream.close()
    told = [r.getMessage() for r in caplog.records if "no voxel" in r.getMessage()]
    assert len(told) == 1 and "aorta (24)" in told[0]


def test_a_mask_under_other_masks_is_named(tmp_path, caplog):
    root = tmp_path / "source"
    content = {
        "classes": ["hidden", "cover"],
        "image": "{case}/ct.nii.gz",
        "masks": "{case}/masks/{class}.nii.gz",
        "splits": {"train": ["a"]},
    }
    (root / "a/masks").mkdir(parents=True)
    for name, width in (("ct", 0), ("masks/hidden", 2), ("masks/cover", 3)):
        array = np.zeros((6, 5, 4), np.int16)
        array[:width] = 1
        nib.save(nib.Nifti1Image(array, np.eye(4)), root / "a" / f"{name}.nii.gz")
    (root / "dataset.json").write_text(json.dumps(content))
    preprocess.preprocess(root, tmp_path / "store")
    assert "hidden (40)" in caplog.text and "cover" not in caplog.text


def test_a_store_keeps_what_its_rule_keeps(source, tmp_path, caplog):
    root = tmp_path / "store"
    rule = {"spacing": 1.5, "label_resampling": "keep_thin"}
    preprocess.preprocess(source, root, **rule)
    assert "no voxel" not in caplog.text
    (case,) = store.find_cases(root, split="train")
    assert case.facts["counts"][VESSEL] == 17  # one for each 1.5 mm of 24
    preprocess.preprocess(source, root, **rule)
    with pytest.raises(checks.UserError, match="=keep_thin, but now most"):
        preprocess.preprocess(source, root, spacing=1.5)
    with pytest.raises(checks.UserError, match="label_resampling .*keep_thn"):
        preprocess.preprocess(source, root, label_resampling="keep_thn")


def to(rule, label, spacing, affine=None):
    affine = np.eye(4) if affine is None else affine
    return resampling.resample(label, affine, spacing=spacing, order=0, rule=rule)[0]


@pytest.mark.parametrize("spacing", [1.5, 2.0, 3.3])
def test_thin_lines_stay_whole(rng, spacing):
    """In any direction, and through an organ, which keeps its other voxels."""
    for _ in range(10):
        label = np.full((40, 40, 40), ORGAN, np.uint8)
        ends = rng.uniform(2, 37, (2, 3))
        places = np.linspace(*ends, 400).round().astype(int)
        label[tuple(places.T)] = VESSEL
        found = to("keep_thin", label, spacing)
        assert ndimage.label(found == VESSEL, WHOLE)[1] == 1
        first, last = np.floor((places[[0, -1]] + 0.5) / spacing).astype(int)
        assert found[tuple(first)] == found[tuple(last)] == VESSEL
        others = found == ORGAN
        np.testing.assert_array_equal(found[others], to("most", label, spacing)[others])


def test_thick_structures_are_as_most_has_them(rng):
    """And slices thicker than the new voxels change nothing."""
    label = np.zeros((40, 40, 16), np.uint8)
    label[3:31, 6:33, 2:13], label[31:39, 6:33, 2:13] = 1, 2
    for affine in (np.eye(4), np.diag([1.0, 1.0, 5.0, 1.0])):
        for spacing in (0.7, 1.5, 2.2):
            found = to("keep_thin", label, spacing, affine)
            expected = to("most", label, spacing, affine)
            np.testing.assert_array_equal(found, expected)


def test_thin_lines_in_thick_slices_stay_whole():
    label = np.zeros((20, 20, 8), np.uint8)
    label[7, 11, 1:7] = 3
    found = to("keep_thin", label, 1.5, np.diag([1.0, 1.0, 5.0, 1.0]))
    assert ndimage.label(found == 3)[1] == 1
    assert abs((found == 3).sum() * 1.5 - 30) <= 1.5


def test_of_two_in_one_voxel_the_smaller_stays():
    label = np.zeros((20, 20, 20), np.uint8)
    label[9, 9, 3:17], label[8, 8, 9] = 1, 2
    found = to("keep_thin", label, 4.0)
    assert (found == 2).sum() == 1 and (found == 1).sum() == 4


def test_nearest_is_the_label_at_the_centre(rng):
    label = rng.integers(0, 9, (20, 21, 22)).astype(np.uint8)
    found = to("nearest", label, 3.0)[:, :, :7]  # the eighth has no centre in the scan
    np.testing.assert_array_equal(found, label[1::3, 1::3, 1::3])
