"""The authors' rows stand below figures of TotalSegmentator-V2, and of nothing else."""

import shutil

import nibabel as nib
import numpy as np
import pytest

from swinsmt_jax.data import meta
from swinsmt_jax.evaluation import published_results
from swinsmt_jax.evaluation.predictions import evaluate_predictions


def dataset(root, *, ids, test=89):
    """A table of the size of TotalSegmentator-V2's, whose last cases are for tests."""
    splits = ["train"] * 1082 + ["val"] * 57 + ["test"] * 89
    if test != 89:
        splits = splits[: len(ids) - test] + ["test"] * test
    names = [f"s{i:04d}" for i in ids]
    meta.add(root, dict(zip(names, splits, strict=True)))
    return [n for n, s in zip(names, splits, strict=True) if s == "test"]


WITH_GAPS = [*range(1000), *range(1202, 1430)]  # 1228 ids up to s1429


def test_its_own_split_and_ids_are_known(tmp_path):
    names = dataset(tmp_path, ids=WITH_GAPS)
    assert published_results.are_of(tmp_path, names)
    assert not published_results.are_of(tmp_path, names[:-1])  # --limit
    assert not published_results.are_of(tmp_path, ["s0000"])  # another split


def test_phantoms_and_ones_own_scans_are_not(tmp_path):
    for name in "abc":
        (tmp_path / name).mkdir()
    names = dataset(tmp_path / "a", ids=range(1, 1229))  # phantoms, as many
    assert not published_results.are_of(tmp_path / "a", names)
    names = dataset(tmp_path / "b", ids=range(1, 41), test=5)
    assert not published_results.are_of(tmp_path / "b", names)
    meta.add(tmp_path / "c", {"patient": "test"})
    assert not published_results.are_of(tmp_path / "c", ["patient"])
    assert not published_results.are_of(tmp_path, ["patient"])  # no table at all


@pytest.mark.parametrize("ids", [(1, 3, 4), (1, 2, 3)])  # with a gap, and phantoms
def test_evaluate_prints_them_for_this_dataset_alone(tmp_path, ids, monkeypatch):
    sizes = {"train": 1, "val": 1, "test": 1}
    monkeypatch.setattr(published_results, "CASES", sizes)
    names = [f"s{i:04d}" for i in ids]
    meta.add(tmp_path, dict(zip(names, sizes, strict=True)))
    cube = np.zeros((4, 4, 4), np.uint8)
    cube[1:3] = 1
    for file in ("ct.nii.gz", "segmentations.nii.gz"):
        (tmp_path / names[-1]).mkdir(exist_ok=True)
        nib.save(nib.Nifti1Image(cube, np.eye(4)), tmp_path / names[-1] / file)
    (tmp_path / "out").mkdir()
    shutil.copy(
        tmp_path / names[-1] / "segmentations.nii.gz",
        tmp_path / "out" / f"{names[-1]}.nii.gz",
    )
    table = evaluate_predictions(
        tmp_path / "out",
        root=tmp_path,
        split="test",
        rule="over_classes",
        output=tmp_path / "results",
        metrics=["dice"],
        workers=1,
    )
    page = (tmp_path / "results" / "report.html").read_text()
    assert ("Reported, by the authors" in table) == (ids == (1, 3, 4))
    assert ("Universal Model" in page) == (ids == (1, 3, 4))
