"""One bad case or name is said and left out; the others go on."""

import gzip
import json

import nibabel as nib
import numpy as np
import pytest

from swinsmt_jax import checks
from swinsmt_jax.data import meta, preprocess, store, store_report
from swinsmt_jax.data.dataset import open_dataset
from swinsmt_jax.data.layouts import totalsegmentator

SHAPE = (6, 5, 4)


def save(path, array, affine=None):
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(array, np.eye(4) if affine is None else affine), path)


def label_of(*numbers):
    label = np.zeros(SHAPE, np.uint8)
    for plane, number in enumerate(numbers):
        label[plane] = number
    return label


def add_case(root, name, *, split="train", affine=None):
    save(root / name / "ct.nii.gz", np.zeros(SHAPE, np.int16), affine)
    save(root / name / "segmentations.nii.gz", label_of(0, 1, 2), affine)
    meta.add(root, {name: split})


def test_whatever_happens_to_a_case_is_its_reason(tmp_path, monkeypatch):
    source = tmp_path / "source"
    for name in ("memory", "vast", "offset", "good"):
        affine = np.diag([900.0, 900, 900, 1]) if name == "vast" else np.eye(4)
        add_case(source, name, affine=affine)
    ct = source / "offset" / "ct.nii.gz"
    content = bytearray(gzip.decompress(ct.read_bytes()))
    content[108:112] = np.array(np.inf, "<f4").tobytes()
    ct.write_bytes(gzip.compress(content))
    load = preprocess.load_case

    def load_case(case, **options):
        if case.name == "memory":
            raise MemoryError("no room\nfor it")
        return load(case, **options)

    monkeypatch.setattr(preprocess, "load_case", load_case)
    failed = preprocess.preprocess(source, tmp_path / "store", spacing=1.5)
    assert list(failed) == ["memory", "vast", "offset"]
    assert failed["memory"] == "MemoryError: no room for it"
    assert "900 mm would have" in failed["vast"]
    assert "ct.nii.gz is truncated or corrupt" in failed["offset"]
    (case,) = store.find_cases(tmp_path / "store", split="train")
    assert case.name == "good"


BAD_NAMES = [
    "store.json",
    "report.html",
    "Meta.csv",
    ".s1",
    "s" * 300,
    "a\nb",
    "ä" * 101,
]


def test_ids_that_a_store_cannot_hold_are_refused_alone(tmp_path):
    root = tmp_path / "source"
    for name in ("good", "s" * 200):
        add_case(root, name)
    content = {
        "classes": ["a", "b"],
        "image": "{case}/ct.nii.gz",
        "labels": "{case}/segmentations.nii.gz",
        "splits": {"train": ["good", *BAD_NAMES, 7, ["x"], None, "s" * 200]},
    }
    (root / "dataset.json").write_text(json.dumps(content))
    failed = preprocess.preprocess(root, tmp_path / "store")
    assert len(failed) == len(BAD_NAMES) + 3
    assert all("plain name of a folder" in reason for reason in failed.values())
    found = store.find_cases(tmp_path / "store", split="train")
    assert [case.name for case in found] == ["good", "s" * 200]
    with pytest.raises(checks.UserError, match="at most 200 bytes, no leading dot"):
        meta.require_id("case", ".x")


@pytest.mark.parametrize("encoding", ["latin-1", "utf-16"])
def test_a_table_in_another_encoding_is_refused(tmp_path, encoding):
    add_case(tmp_path, "s1")
    text = "image_id;place;split\ns1;Köln;train\n"
    (tmp_path / "meta.csv").write_bytes(text.encode(encoding))
    for use in (
        lambda: totalsegmentator.find_cases(tmp_path, split="train"),
        lambda: meta.add(tmp_path, {"s2": "val"}),
    ):
        with pytest.raises(
            checks.UserError, match=r"meta\.csv .*save it as CSV in UTF"
        ):
            use()


def nnunet(root, **changes):
    for i in range(10):
        save(root / f"imagesTr/c{i}_0000.nii.gz", np.zeros(SHAPE, np.int16))
        save(root / f"labelsTr/c{i}.nii.gz", label_of(0, 1))
    save(root / "imagesTs/t_0000.nii.gz", np.zeros(SHAPE, np.int16))
    save(root / "labelsTs/t.nii.gz", label_of(0, 1))
    content = {"channel_names": {"0": "CT"}, "labels": {"background": 0, "liver": 1}}
    (root / "dataset.json").write_text(json.dumps(content | changes))
    return root


def test_nnunet_cases_without_labels_are_named_and_move_no_split(tmp_path):
    root = nnunet(tmp_path / "raw")
    before = open_dataset(root).splits
    (root / "labelsTr/c1.nii.gz").unlink()
    (root / "imagesTr/c2_0000.nii.gz").unlink()
    failed = preprocess.preprocess(root, tmp_path / "store")
    assert set(failed) == {"c1", "c2"}
    assert "the labels of the case 'c1'" in failed["c1"]
    assert "the image of the case 'c2'" in failed["c2"]
    assert open_dataset(root).splits == before
    assert [name for name in before if before[name] == "val"] == ["c4", "c9"]


def test_bad_ids_of_nnunet_are_refused_alone(tmp_path):
    root = nnunet(tmp_path / "raw")
    (root / "labelsTr/a:b.nii.gz").write_bytes(b"")
    (root / "labelsTs/c3.nii.gz").write_bytes(b"")
    ids = {f.name.partition(".")[0] for f in (root / "labelsTr").iterdir()}
    folds = [{"train": sorted(ids - {"c1"}), "val": ["c1", "nowhere", ["x"]]}]
    (root / "splits_final.json").write_text(json.dumps(folds))
    failed = preprocess.preprocess(root, tmp_path / "store")
    assert set(failed) == {"a:b", "c3", "nowhere", "['x']"}
    assert "both its training and its test folders" in failed["c3"]
    assert "neither image nor labels" in failed["nowhere"]
    (case,) = store.find_cases(tmp_path / "store", split="val")
    assert case.name == "c1"
    assert "8 train, 1 val, 1 test" in store_report.write(tmp_path / "store")


@pytest.mark.parametrize(
    "changes", [{"channel_names": None}, {"labels": {"0": ["a"], "1": "b"}}]
)
def test_null_in_nnunets_description_is_refused(tmp_path, changes):
    with pytest.raises(checks.UserError, match="dataset.json"):
        open_dataset(nnunet(tmp_path, **changes))


def test_a_subset_of_overlapping_masks_is_that_of_the_full_store(tmp_path):
    root = tmp_path / "raw"
    save(root / "s1.nii.gz", np.zeros(SHAPE, np.int16))
    names = ["first", "liver", "cyst", "spleen"]
    for plane, name in enumerate(names):
        mask = np.zeros(SHAPE, np.uint8)
        mask[plane : plane + 2] = 1
        save(root / f"s1/{name}.nii.gz", mask)
    content = {
        "classes": names,
        "image": "{case}.nii.gz",
        "masks": "{case}/{class}.nii.gz",
        "splits": {"train": ["s1"]},
    }
    (root / "dataset.json").write_text(json.dumps(content))
    labels = []
    for classes in ((), ("liver", "spleen")):
        target = tmp_path / f"store{len(classes)}"
        assert preprocess.preprocess(root, target, classes=classes) == {}
        (case,) = store.find_cases(target, split="train")
        labels.append(case.read().label)
    expected = np.select([labels[0] == 2, labels[0] == 4], [1, 2], 0)
    np.testing.assert_array_equal(labels[1], expected)
    assert (labels[1][2] == 0).all()  # the cyst, though dropped, lies on the liver
