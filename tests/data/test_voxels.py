"""What voxels may hold, on every way in."""

import json

import nibabel as nib
import numpy as np
import pytest

from swinsmt_jax.checks import UserError
from swinsmt_jax.class_map import ClassMap
from swinsmt_jax.data import case, nifti
from swinsmt_jax.data.dataset import open_dataset
from swinsmt_jax.data.label_files import load_prediction

AFFINE = np.diag([2.0, 2, 3, 1])
INSIDE = np.zeros((20, 20, 12), bool)
INSIDE[6:14, 6:14, 4:8] = True


@pytest.fixture
def read(tmp_path):
    """Write a mask; return the labels that training and evaluation read of it."""

    def ways(mask):
        folder = tmp_path / "c1" / "masks"
        folder.mkdir(parents=True)
        ct = np.full(INSIDE.shape, 50, np.int16)
        nib.save(nib.Nifti1Image(ct, AFFINE), tmp_path / "c1/ct.nii.gz")
        nib.save(nib.Nifti1Image(mask, AFFINE), folder / "liver.nii.gz")
        description = {
            "classes": ["liver"],
            "image": "{case}/ct.nii.gz",
            "masks": "{case}/masks/{class}.nii.gz",
            "splits": {"train": ["c1"]},
        }
        (tmp_path / "dataset.json").write_text(json.dumps(description))
        data = open_dataset(tmp_path)
        found = data.find("c1", "train")
        classes = ClassMap(("background", "liver"))
        like = nifti.load_ct(tmp_path / "c1/ct.nii.gz")
        return (
            lambda: case.load_case(found, classes=data.classes),
            lambda: load_prediction(folder, classes=classes, like=like),
        )

    return ways


@pytest.mark.parametrize("outside", [0, 1e-7, -0.1, 0.4])
def test_a_resampled_mask_is_thresholded_with_a_note(read, outside, caplog):
    training, evaluation = read(np.where(INSIDE, 0.9, outside).astype(np.float32))
    sample = training()
    np.testing.assert_array_equal(sample.label, INSIDE)
    assert "liver.nii.gz holds values between 0 and 1" in sample.notes[-1]
    np.testing.assert_array_equal(evaluation(), INSIDE)
    assert "those of at least 0.5 are inside" in caplog.text


@pytest.mark.parametrize("kind", [bool, np.uint8, np.int16, np.float32])
def test_masks_of_0_and_1_are_taken_without_a_word(read, kind, caplog):
    mask = INSIDE.astype(np.uint8 if kind is bool else kind)
    training, evaluation = read(mask)
    assert training().notes == () and not caplog.text
    np.testing.assert_array_equal(evaluation(), INSIDE)


@pytest.mark.parametrize(
    ("value", "words"),
    [(255, "0 to 255, but a mask holds 0 and 1"), (-3, "-3 to 0"), (0.1, "0.1, but")],
)
def test_other_values_are_no_mask(read, value, words):
    for way in read(np.where(INSIDE, value, 0).astype(np.float32)):
        with pytest.raises(UserError, match=rf"liver.nii.gz holds values.*{words}"):
            way()


def test_an_image_may_lie_among_its_masks(tmp_path):
    (tmp_path / "p1").mkdir()
    names = ("liver", "tumour")
    for plane, name in enumerate(("ct", *names)):
        array = np.zeros((8, 8, 8), np.int16)
        array[plane] = 50 if name == "ct" else 1
        nib.save(nib.Nifti1Image(array, AFFINE), tmp_path / "p1" / f"{name}.nii.gz")
    description = {
        "classes": names,
        "image": "{case}/ct.nii.gz",
        "masks": "{case}/{class}.nii.gz",
        "splits": {"train": ["p1"]},
    }
    (tmp_path / "dataset.json").write_text(json.dumps(description))
    data = open_dataset(tmp_path)
    found = data.find("p1", "train")
    label = case.load_case(found, classes=data.classes).label
    assert np.bincount(label.reshape(-1)).tolist() == [384, 64, 64]
    assert len(found.facts) == 3
