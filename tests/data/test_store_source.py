"""A store knows what it was made from, and loses nothing by a mistaken command."""

import json
import os
import shutil

import nibabel as nib
import numpy as np
import pytest

from swinsmt_jax import checks
from swinsmt_jax.config import DataConfig
from swinsmt_jax.data import folds, meta, pipeline, store
from swinsmt_jax.data.preprocess import preprocess

CASES = {"a": "train", "b": "train", "c": "val"}


def write_labels(root, name, value):
    """Write uncompressed labels, whose size tells nothing."""
    label = np.zeros((6, 6, 6), np.uint8)
    label[2:4] = value
    nib.save(nib.Nifti1Image(label, np.eye(4)), root / f"{name}_labels.nii")


def describe(root, **changes):
    splits = {s: [n for n, own in CASES.items() if own == s] for s in meta.SPLITS}
    content = {"classes": ["liver", "spleen"], "image": "{case}.nii"}
    content |= {"labels": "{case}_labels.nii", "splits": splits}
    (root / "dataset.json").write_text(json.dumps(content | changes))


@pytest.fixture
def made(tmp_path):
    """A dataset of three cases, and a store of it."""
    source = tmp_path / "source"
    source.mkdir()
    for name in CASES:
        hu = np.random.default_rng(ord(name)).integers(-900, 900, (6, 6, 6), np.int16)
        nib.save(nib.Nifti1Image(hu, np.eye(4)), source / f"{name}.nii")
        write_labels(source, name, 1)
    describe(source)
    preprocess(source, tmp_path / "store")
    return source, tmp_path / "store"


def counts(root, name):
    return store.read_json(root / name / store.CASE)["counts"]


@pytest.mark.parametrize("how", ["written", "time kept", "put aside and swapped"])
def test_what_changed_is_made_anew_and_named(made, caplog, how):
    source, root = made
    file, kept = source / "a_labels.nii", root / "b" / store.CASE
    before, stamp = kept.stat().st_mtime_ns, file.stat()
    if how == "put aside and swapped":
        shutil.copytree(source, source.with_name("new"))
        write_labels(source.with_name("new"), "a", 2)
        source.rename(source.with_name("old"))
        source.with_name("new").rename(source)
    else:
        write_labels(source, "a", 2)
    if how == "time kept":
        os.utime(file, ns=(stamp.st_atime_ns, stamp.st_mtime_ns))
    assert file.stat().st_size == stamp.st_size
    preprocess(source, root)
    assert counts(root, "a")[1:] == [0, 72] and kept.stat().st_mtime_ns == before
    assert "a is made again: its files changed: a_labels.nii" in caplog.text
    assert "1 classes are in no training case" not in caplog.text


def test_what_is_gone_stays_until_it_is_pruned(made, caplog, capsys):
    source, root = made
    describe(source, splits={"train": ["a"], "val": ["c"]})
    preprocess(source, root, check=True)
    said = capsys.readouterr().out
    assert "2 cases stay as they are" in said and "no longer listed" in said
    assert list(meta.read(root)) == list(CASES)
    preprocess(source, root)
    assert list(meta.read(root)) == ["a", "c"] and (root / "b" / store.CASE).is_file()
    assert "excluded: b. They are not used; what was made of them stays" in caplog.text
    describe(source)
    preprocess(source, root)  # it comes back as it was
    assert list(meta.read(root)) == list(CASES)
    preprocess(source, root, exclude=["b"], prune=True)
    assert not (root / "b").exists()


@pytest.mark.parametrize("ids", ["the same", "others"])
def test_another_source_is_refused(made, tmp_path, ids):
    source, root = made
    other = tmp_path / "other"
    shutil.copytree(source, other)
    if ids == "the same":
        write_labels(other, "a", 2)
        words = "with other files|the same cases with other files: a"
    else:
        for name in CASES:
            for end in (".nii", "_labels.nii"):
                (other / f"{name}{end}").rename(other / f"q{name}{end}")
        describe(other, splits={"train": ["qa", "qb"], "val": ["qc"]})
        words = "none of its cases: a, b, c"
    for again in range(2):
        with pytest.raises(checks.UserError, match=words):
            preprocess(other, root, check=bool(again))
    assert list(meta.read(root)) == list(CASES) and counts(root, "a")[1:] == [72, 0]
    preprocess(other, root, prune=True)
    assert (root / "a").exists() == (ids == "the same")


def test_a_source_may_move(made, caplog):
    source, root = made
    moved = source.rename(source.with_name("moved"))
    preprocess(moved, root)
    assert "made again" not in caplog.text
    assert store.read_json(root / store.INDEX)["source"]["root"] == str(moved)


def test_groups_are_changed_without_making_cases(made):
    source, root = made
    before = (root / "a" / store.CASE).stat().st_mtime_ns
    describe(source, groups={"abdomen": ["liver"]})
    preprocess(source, root)
    assert store.read_options(root).classes.groups == {"abdomen": (1,)}
    assert (root / "a" / store.CASE).stat().st_mtime_ns == before


def test_a_store_of_before_is_continued(made, caplog):
    source, root = made
    for name in CASES:
        facts = store.read_json(root / name / store.CASE)
        facts["source"] = [size for size, _ in facts["source"].values()]
        del facts["times"], facts["absent"]
        (root / name / store.CASE).write_text(json.dumps(facts))
    index = store.read_json(root / store.INDEX)
    kept = {key: index[key] for key in ("format", "options", "failed", "excluded")}
    (root / store.INDEX).write_text(json.dumps(kept))
    preprocess(source, root)
    assert "made again" not in caplog.text
    (source / "a_labels.nii").write_bytes(b"")
    assert "a" in preprocess(source, root)


@pytest.mark.parametrize("where", ["raw", "store"])
def test_folds_divide_training_and_validation_cases(made, where):
    source, root = made
    place = {"raw": source, "store": root}[where]
    config = DataConfig(str(place), (32, 32, 32), 1, fold=0)
    with pytest.raises(checks.UserError, match="5 folds need at least 5 cases"):
        pipeline.find_cases(config, split="val")
    names = [f"s{i}" for i in range(12)]
    held_out = []
    for number in range(folds.COUNT):
        found = folds.splits_of(number, names)
        assert list(found) == names
        held_out += [name for name, split in found.items() if split == "val"]
    assert sorted(held_out) == sorted(names)
    listed = [{"train": ["s0"], "val": ["s1"]}]
    assert folds.splits_of(0, names, folds=listed) == {"s0": "train", "s1": "val"}
    for number, words in ((1, "not one of the 1 folds"), (0, "lists 1 cases .* s1")):
        with pytest.raises(checks.UserError, match=words):
            folds.splits_of(number, ["s0"], folds=listed)


def test_masks_that_are_not_there_are_absent_structures(made, tmp_path, caplog):
    source, _ = made
    for name in CASES:
        (source / name).mkdir()
        for own, planes in (("Liver", slice(2)), ("spleen", slice(2, 3))):
            mask = np.zeros((6, 6, 6), np.uint8)
            mask[planes] = 1
            nib.save(nib.Nifti1Image(mask, np.eye(4)), source / name / f"{own}.nii")
    (source / "b" / "spleen.nii").rename(source / "b" / "spleeen.nii")
    masks = {"labels": None, "masks": "{case}/{class}.nii"}
    describe(source, **masks)
    assert preprocess(source, tmp_path / "masks") == {}
    assert counts(tmp_path / "masks", "b")[1:] == [72, 0]
    assert "1 masks of 1 cases are missing" in caplog.text
    (note,) = store.read_json(tmp_path / "masks/b" / store.CASE)["notes"][-1:]
    assert "spleeen.nii is not a mask of any class" in note and "'spleen'" in note
    describe(source, **masks, missing_masks="refused")
    failed = preprocess(source, tmp_path / "refused")
    assert list(failed) == ["b"] and "lacks 1 of 2 masks: spleen" in failed["b"]
