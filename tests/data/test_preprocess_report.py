"""The report: of nothing, of odd names, on a full disk, and what it tells."""

import json
import re
import resource

import nibabel as nib
import numpy as np
import pytest

from swinsmt_jax import checks
from swinsmt_jax.data import preprocess, store_report

SHAPE = (6, 5, 4)
ODD = "<i>s1 & co"


def save(path, array, *, qform=None):
    path.parent.mkdir(parents=True, exist_ok=True)
    image = nib.Nifti1Image(array, np.eye(4))
    if qform is not None:
        image.set_qform(qform, 1)
    nib.save(image, path)


@pytest.fixture
def source(tmp_path):
    """One case with overlapping masks and two orientations, and one without a CT."""
    root = tmp_path / "source"
    content = {
        "classes": ["<b>liver", "spleen"],
        "image": "{case}/ct.nii.gz",
        "masks": "{case}/masks/{class}.nii.gz",
        "splits": {"train": [ODD, "<i>lost"], "val": ["left", "plain"]},
    }
    for name in (ODD, "plain"):
        qform = np.diag([1.0, -1, 1, 1]) if name == ODD else None
        save(root / name / "ct.nii.gz", np.zeros(SHAPE, np.int16), qform=qform)
        for i, part in enumerate(content["classes"]):
            mask = np.zeros(SHAPE, np.uint8)
            mask[i if name == ODD else 2 * i :][:2] = 1
            save(root / name / "masks" / f"{part}.nii.gz", mask)
    (root / "dataset.json").write_text(json.dumps(content))
    return root


@pytest.fixture
def store(source, tmp_path):
    preprocess.preprocess(source, tmp_path / "store", exclude=["left"])
    return tmp_path / "store"


def test_a_report_tells_what_to_check(store):
    summary = store_report.write(store)
    assert "2 cases (1 train, 1 val, 0 test)" in summary
    assert re.search(r"\d\.\d\d MB a case.*1 failed, 1 excluded; 2 written", summary)
    assert re.search(r"[1-9]\d*\.\d cases/minute", summary)
    found = json.loads((store / "report.json").read_text())
    assert found["excluded"] == ["left"] and list(found["failed"]) == ["<i>lost"]
    assert found["overlaps"] == {ODD: 20} and found["overlapping_voxels"] == 20
    assert list(found["notes"]) == [ODD]
    assert "its sform and qform disagree by up to 8.0 mm" in found["notes"][ODD][0]
    page = (store / "report.html").read_text()
    for words in ("sform and qform disagree", "20 voxels", "<b>left</b>: --exclude"):
        assert words in page
    assert "&lt;i&gt;s1 &amp; co" in page and "&lt;b&gt;liver" in page
    assert "&lt;i&gt;lost" in page
    assert "<i>" not in page and "<b>liver" not in page


def test_a_store_without_cases_has_a_report(source, tmp_path):
    for file in source.glob("*/ct.nii.gz"):
        file.unlink()
    failed = preprocess.preprocess(source, tmp_path / "store")
    assert len(failed) == 4
    assert "0 cases (0 train, 0 val, 0 test)" in store_report.write(tmp_path / "store")
    page = (tmp_path / "store" / "report.html").read_text()
    assert all(name.replace("<", "&lt;").split("&")[0] in page for name in failed)
    found = json.loads((tmp_path / "store" / "report.json").read_text())
    assert found["classes"]["spleen"] == {"voxels": 0, "cases": 0}


def test_a_full_disk_leaves_the_last_report(store):
    store_report.write(store)
    before = {file: file.read_bytes() for file in store.iterdir() if file.is_file()}
    limit, most = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**12, most))  # no larger file
    try:
        words = "html cannot be written.*make room"
        with pytest.raises(checks.UserError, match=words):
            store_report.write(store)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, most))
    after = {file: file.read_bytes() for file in store.iterdir() if file.is_file()}
    assert after == before


def test_progress_tells_the_rate(source, tmp_path, capfd):
    preprocess.preprocess(source, tmp_path / "store", progress=True)
    told = capfd.readouterr()
    assert re.search(r"4/4 \[.*, \d+\.\d cases/(s|minute)\]", told.err)
    assert "<i>lost is left out: the image" in told.out
    assert preprocess.rate(3, 60.0) == "3.0 cases/minute"
    assert preprocess.rate(90, 60.0) == "1.5 cases/s"
