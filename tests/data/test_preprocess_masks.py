"""Cases of one mask per structure: what is merged, and what is refused alone."""

import gzip
import json

import nibabel as nib
import numpy as np
import pytest

from swinsmt_jax import checks, labels
from swinsmt_jax.data import known_bad_cases, meta, preprocess, store, store_report


def save(path, array, affine=None):
    image = nib.Nifti1Image(array, np.eye(4) if affine is None else affine)
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(image, path)


def write_masks(root, name, *, empty=False):
    """Add a case of 6^3 voxels with 117 masks, of which the liver's has voxels."""
    save(root / name / "ct.nii.gz", np.zeros((6, 6, 6), np.int16))
    for structure in labels.CLASS_NAMES[1:]:
        mask = np.zeros((6, 6, 6), np.uint8)
        mask[2:4] = structure == "liver" and not empty
        save(root / name / f"segmentations/{structure}.nii.gz", mask)
    meta.add(root, {name: "train"})
    return root / name


def test_overlapping_masks_are_counted(tmp_path):
    folder = write_masks(tmp_path / "source", "s1") / "segmentations"
    for name, planes in (("spleen", slice(3)), ("liver", slice(2, 4))):
        mask = np.zeros((6, 6, 6), np.uint8)
        mask[planes] = 1
        save(folder / f"{name}.nii.gz", mask)
    failed = preprocess.preprocess(tmp_path / "source", tmp_path / "store", spacing=0.0)
    assert failed == {}
    (case,) = store.find_cases(tmp_path / "store", split="train")
    assert case.facts["overlapping_voxels"] == 36
    assert (case.read().label[2:4] == labels.CLASS_IDS["liver"]).all()


@pytest.mark.parametrize(
    ("kept", "winners"),
    [
        # voxels of plane 0, 1, ... 5; liver 2 planes, spleen 3, kidney_right 3
        ((), ["spleen", "spleen", "liver", "liver", "kidney_right", "background"]),
        (("spleen",), ["spleen", "spleen", *["background"] * 4]),
    ],
    ids=["all classes", "one class"],
)
def test_the_smaller_of_overlapping_masks_wins_if_asked(tmp_path, kept, winners):
    folder = write_masks(tmp_path / "source", "s1") / "segmentations"
    planes = {"spleen": (0, 3), "kidney_right": (2, 5), "liver": (2, 4)}
    for name, (first, end) in planes.items():
        mask = np.zeros((6, 6, 6), np.uint8)
        mask[first:end] = 1
        save(folder / f"{name}.nii.gz", mask)
    source, root = tmp_path / "source", tmp_path / "store"
    options = {"overlaps": "smaller", "classes": kept}
    assert preprocess.preprocess(source, root, **options) == {}
    (case,) = store.find_cases(root, split="train")
    names = store.read_options(root).classes.names
    found = case.read().label
    assert [names[i] for i in found[:, 0, 0]] == winners
    assert (found == found[:, :1, :1]).all()
    summary = store_report.write(root)
    report = json.loads((root / "report.json").read_text())
    assert report["overlaps_rule"] == "smaller"
    if not kept:
        assert report["overlapping_voxels"] == 36 + 72
        assert "108 voxels claimed by several masks, the smaller mask wins" in summary
    with pytest.raises(checks.UserError, match="--overlaps=smaller, but now order"):
        preprocess.preprocess(source, root, classes=kept)


def test_known_bad_cases_are_left_out_with_reason_and_source(tmp_path, caplog):
    source, root = tmp_path / "source", tmp_path / "store"
    for name in ("s0001", "s0513", "s0864"):
        write_masks(source, name)
    assert preprocess.preprocess(source, root, exclude=["known"]) == {}
    assert [c.name for c in store.find_cases(root, split="train")] == ["s0001"]
    store_report.write(root)
    report = json.loads((root / "report.json").read_text())
    assert report["excluded"] == ["s0513", "s0864"]
    page = (root / "report.html").read_text()
    assert "humerus_right: the mask is wrong" in page and "issues/245" in page
    for reason in known_bad_cases.reasons().values():
        assert "https://github.com/wasserth/TotalSegmentator/issues/" in reason


def test_known_bad_cases_are_those_of_totalsegmentator_alone(tmp_path):
    root = tmp_path / "other"
    write_masks(root, "s0513")
    (root / "meta.csv").rename(root / "splits.csv")
    content = {"image": "{case}/ct.nii.gz", "classes": ["liver", "spleen"]}
    content |= {"masks": "{case}/segmentations/{class}.nii.gz"}
    content |= {"splits": {"train": ["s0513"]}}
    (root / "dataset.json").write_text(json.dumps(content))
    with pytest.raises(checks.UserError, match="exclude is 'known'.*of TotalSegm"):
        preprocess.preprocess(root, tmp_path / "store", exclude=["known"])


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        ("missing mask", ["lacks 1 of 117 masks: liver"]),
        ("mask on another grid", ["liver.nii.gz", "has shape (7, 6, 6)"]),
        ("mask beside the ct", ["liver.nii.gz", "0.50 voxels away"]),
        ("unknown mask", ["livver.nii.gz", "Did you mean 'liver'"]),
        ("truncated ct", ["ct.nii.gz", "truncated or corrupt"]),
        ("affine without inverse", ["ct.nii.gz", "cannot be inverted"]),
        ("all masks empty", None),
    ],
)
def test_a_case_is_refused_alone(tmp_path, spoil, words):
    for name in ("bad", "good"):
        write_masks(tmp_path / "source", name, empty=spoil == "all masks empty")
    folder = tmp_path / "source" / "bad" / "segmentations"
    liver = folder / "liver.nii.gz"
    if spoil == "missing mask":
        liver.unlink()
    elif spoil == "mask on another grid":
        save(liver, np.zeros((7, 6, 6), np.uint8))
    elif spoil == "mask beside the ct":
        moved = np.eye(4)
        moved[0, 3] = 0.5
        save(liver, np.zeros((6, 6, 6), np.uint8), moved)
    elif spoil == "unknown mask":
        liver.rename(folder / "livver.nii.gz")
    elif spoil == "truncated ct":
        ct = folder.parent / "ct.nii.gz"
        save(ct, np.random.default_rng(0).integers(0, 999, (32, 32, 32), np.int16))
        ct.write_bytes(ct.read_bytes()[:20_000])
    elif spoil == "affine without inverse":
        image = nib.Nifti1Image(np.zeros((6, 6, 6), np.int16), None)
        image.header["sform_code"] = 1  # its rows are zero
        (folder.parent / "ct.nii.gz").write_bytes(gzip.compress(image.to_bytes()))
    failed = preprocess.preprocess(tmp_path / "source", tmp_path / "store", spacing=0.0)
    assert list(failed) == ["bad"] * (words is not None)
    for word in words or ():
        assert word in failed["bad"]
    found = store.find_cases(tmp_path / "store", split="train")
    assert [case.name for case in found] == ["bad", "good"][words is not None :]


def test_bad_lines_of_meta_are_refused_alone(tmp_path):
    for name in ("s1", "s2", "s3", "s4"):
        write_masks(tmp_path / "source", name)
    meta = tmp_path / "source" / "meta.csv"
    lines = ["s1;train", "s2;trian", "../s3;train", "s3;train", "s4;val", "s4;train"]
    meta.write_text("\n".join(["image_id;split", *lines]))
    failed = preprocess.preprocess(
        tmp_path / "source", tmp_path / "store", spacing=0.0, exclude=["s2"]
    )
    assert list(failed) == [f"line 4 of {meta}", "s4"]
    assert "'../s3', but must be the plain name" in failed[f"line 4 of {meta}"]
    assert (
        "line 7" in failed["s4"]
        and "lists the case 's4' more than once" in failed["s4"]
    )
    found = store.find_cases(tmp_path / "store", split="train")
    assert [case.name for case in found] == ["s1", "s3"]
    assert not (tmp_path / "store" / "s4").exists()
