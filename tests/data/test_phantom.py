import json

import nibabel as nib
import numpy as np
import pytest

from swinsmt_jax import checks, labels
from swinsmt_jax.data.case import load_case
from swinsmt_jax.data.layouts import totalsegmentator
from swinsmt_jax.phantoms import dataset as phantom

ID = labels.CLASS_IDS


@pytest.fixture(scope="module")
def body():
    """One whole body at 6 mm."""
    return phantom.make_phantom(3, spacing=6, region="whole")


def centre(label, name):
    return np.argwhere(label == ID[name]).mean(axis=0)


@pytest.mark.parametrize(("seed", "spacing"), [(0, 6), (1, 7.5), (2, 8), (3, 7.5)])
def test_whole_body_holds_all_117_structures(seed, spacing):
    ct, label, affine = phantom.make_phantom(seed, spacing=spacing, region="whole")
    assert ct.shape == label.shape
    assert (ct.dtype, label.dtype) == (np.int16, np.uint8)
    counts = np.bincount(label.ravel(), minlength=118)
    assert counts.size == 118
    few = {labels.CLASS_NAMES[i]: int(n) for i, n in enumerate(counts) if n < 4}
    assert not few
    np.testing.assert_array_equal(np.diag(affine), (spacing, spacing, spacing, 1))


def test_phantom_is_a_pure_function_of_its_arguments(body):
    again = phantom.make_phantom(3, spacing=6, region="whole")
    for a, b in zip(body, again, strict=True):
        np.testing.assert_array_equal(a, b)
    other = phantom.make_phantom(4, spacing=6, region="whole")
    assert not np.array_equal(other[2], body[2])


def test_parts_lie_where_they_do_in_the_body(body):
    _, label, _ = body
    for name in ("kidney", "femur", "scapula", "hip", "autochthon", "humerus"):
        assert centre(label, f"{name}_right")[0] > centre(label, f"{name}_left")[0] + 3
    assert centre(label, "liver")[0] > centre(label, "spleen")[0] + 10
    assert centre(label, "heart")[0] < label.shape[0] / 2
    assert centre(label, "sternum")[1] > centre(label, "vertebrae_T6")[1] + 10
    assert (
        centre(label, "brain")[2]
        > centre(label, "heart")[2]
        > centre(label, "femur_left")[2]
    )
    spine = [n for n in labels.CLASS_NAMES if n.startswith("vertebrae_")]
    heights = [centre(label, name)[2] for name in spine]  # S1, L5, ..., C1
    assert np.all(np.diff(heights) > 1)
    for side in ("left", "right"):
        heights = [centre(label, f"rib_{side}_{n}")[2] for n in range(1, 11)]
        assert np.all(np.diff(heights) < -1)


def test_tissues_have_their_hu(body):
    ct, label, _ = body
    inner = {"liver": (30, 150), "lung_upper_lobe_left": (-900, -650)}
    inner |= {"brain": (10, 80), "hip_left": (100, 700), "colon": (-980, 80)}
    for name, (low, high) in inner.items():
        assert low < np.median(ct[label == ID[name]]) < high, name
    assert ct.min() >= -1024
    assert np.median(ct[:3, -3:, :]) == pytest.approx(-1000, abs=20)  # air
    fat = (ct > -140) & (ct < -70) & (label == 0)
    assert fat.mean() > 0.03


def test_sides_and_numbers_cannot_be_told_from_hu():
    """Over bodies, the HU of left and right, and of neighbours, are alike."""
    means = []
    for seed in range(5):
        ct, label, _ = phantom.make_phantom(seed, spacing=7, region="whole")
        means.append([ct[label == i].mean() for i in range(118)])
    means = np.mean(means, axis=0)
    pairs = [("kidney_left", "kidney_right"), ("femur_left", "femur_right")]
    pairs += [(f"rib_left_{n}", f"rib_right_{n}") for n in range(1, 13)]
    pairs += [("rib_left_5", "rib_left_6"), ("vertebrae_T5", "vertebrae_T6")]
    for a, b in pairs:
        assert abs(means[ID[a]] - means[ID[b]]) < 60, (a, b)


def test_fields_of_view_leave_classes_out():
    _, chest, _ = phantom.make_phantom(0, spacing=8, region="chest")
    assert {ID["heart"], ID["rib_left_5"]} <= set(np.unique(chest))
    assert not {ID["brain"], ID["femur_left"], ID["urinary_bladder"]} & set(
        np.unique(chest)
    )
    _, head, _ = phantom.make_phantom(0, spacing=8, region="head")
    assert ID["brain"] in head
    assert ID["liver"] not in head
    shapes = {phantom.make_phantom(s, spacing=12)[0].shape for s in range(6)}
    assert len(shapes) > 3


def test_lesser_variation_brings_bodies_closer():
    def spread(variation):
        places = [
            centre(
                phantom.make_phantom(
                    s, spacing=12, region="whole", variation=variation
                )[1],
                "liver",
            )
            for s in range(3)
        ]
        return np.std(places, axis=0).sum()

    assert spread(0.0) < 0.2
    assert spread(1.0) > 0.5


def test_bad_arguments_are_refused():
    with pytest.raises(checks.UserError, match="spacing is 0.1"):
        phantom.make_phantom(0, spacing=0.1)
    with pytest.raises(checks.UserError, match="'chets'.*Did you mean 'chest'"):
        phantom.make_phantom(0, spacing=8, region="chets")


def test_dataset_has_the_layout_of_the_download(tmp_path):
    root = tmp_path / "phantoms"
    sizes = {"train": 1, "val": 1, "test": 1}
    for masks in (False, True):
        out = root / str(masks)
        phantom.write_dataset(out, **sizes, spacing=12, seed=1, masks=masks)
    assert (root / "True/meta.csv").read_bytes().startswith(b"\xef\xbb\xbfimage_id;")
    axes = set()
    for split, count in sizes.items():
        pairs = [
            totalsegmentator.find_cases(root / m, split=split)
            for m in ("False", "True")
        ]
        assert len(pairs[0]) == count
        for a, b in zip(*pairs, strict=True):
            assert a.segmentation.is_file()
            assert len(list(b.segmentation.parent.iterdir())) == 117
            x, y = load_case(a), load_case(b)
            np.testing.assert_array_equal(x.image, y.image)
            np.testing.assert_array_equal(x.label, y.label)
            assert nib.aff2axcodes(x.affine) == ("R", "A", "S")
            axes.add(nib.aff2axcodes(nib.load(a.ct).affine))
            if split != "train":
                assert len(np.unique(x.label)) == 118
    assert len(axes) > 1
    assert not list(root.rglob(".*"))


def test_folder_is_completed_kept_or_refused(tmp_path):
    root = tmp_path / "phantoms"
    arguments = {"train": 2, "val": 0, "test": 0, "spacing": 12, "seed": 1}
    phantom.write_dataset(root, **arguments)
    times = {p: p.stat().st_mtime_ns for p in root.rglob("*.nii.gz")}
    phantom.write_dataset(root, **arguments)
    assert times == {p: p.stat().st_mtime_ns for p in root.rglob("*.nii.gz")}

    (root / "meta.csv").unlink()  # as if interrupted before the second case
    for path in (root / "s0002").iterdir():
        path.unlink()
    (root / "s0002").rmdir()
    (root / ".partial-s0002").mkdir()
    phantom.write_dataset(root, **arguments)
    assert len(totalsegmentator.find_cases(root, split="train")) == 2
    assert not (root / ".partial-s0002").exists()
    first = root / "s0001/ct.nii.gz"
    assert first.stat().st_mtime_ns == times[first]

    with pytest.raises(checks.UserError, match="'seed': 1.*but.*'seed': 2"):
        phantom.write_dataset(root, **(arguments | {"seed": 2}))
    with pytest.raises(checks.UserError, match="spacing is 99"):
        phantom.write_dataset(tmp_path / "new", **(arguments | {"spacing": 99}))
    assert not (tmp_path / "new").exists()
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/thesis.txt").write_text("")
    with pytest.raises(checks.UserError, match="mine holds other files"):
        phantom.write_dataset(tmp_path / "mine", **arguments)


def test_command_writes_a_dataset_in_worker_processes(tmp_path, capfd):
    root = tmp_path / "phantoms"
    command = [f"--root={root}", "--cases=4", "--val=1", "--test=1", "--spacing=12"]
    phantom.main([*command, "--seed=0", "--workers=2"])
    assert len(totalsegmentator.find_cases(root, split="train")) == 2
    assert json.loads((root / phantom.MARKER).read_text())["val"] == 1
    with pytest.raises(SystemExit, match="2"):
        phantom.main([*command, "--seed=1"])
    assert "error: " in capfd.readouterr().err
    with pytest.raises(SystemExit):
        phantom.main([*command, "--seed=0", "--test=9"])


@pytest.mark.parametrize(
    ("argument", "words"),
    [
        ("--workers=0", "workers is 0"),
        ("--seed=-1", "seed is -1"),
        ("--variation=-1", "variation is -1.0, but must lie in [0, 5]"),
        ("--root={file}/phantoms", "cannot be written"),
    ],
)
def test_bad_arguments_of_the_command_are_one_line(tmp_path, capfd, argument, words):
    file = tmp_path / "file"
    file.write_text("")
    command = [f"--root={tmp_path / 'new'}", "--cases=1", "--spacing=12", "--workers=1"]
    with pytest.raises(SystemExit, match="2"):
        phantom.main([*command, argument.format(file=file)])
    told = capfd.readouterr().err
    assert told.count("\n") == 1 and told.startswith("error: ") and words in told
    assert not (tmp_path / "new").exists()
