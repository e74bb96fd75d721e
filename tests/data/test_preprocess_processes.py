"""Two runs at once, and cases that end the process that works on them."""

import os
import signal

import nibabel as nib
import numpy as np
import pytest

from swinsmt_jax import checks
from swinsmt_jax.data import meta, preprocess, store


def test_a_second_run_on_a_store_is_refused(tmp_path):
    source, root = tmp_path / "source", tmp_path / "store"
    for name in ("ct", "segmentations"):
        file = source / "s1" / f"{name}.nii.gz"
        file.parent.mkdir(parents=True, exist_ok=True)
        nib.save(nib.Nifti1Image(np.zeros((4, 4, 4), np.uint8), np.eye(4)), file)
    meta.add(source, {"s1": "train"})
    with store.opened(root, store.Options(0.0)):
        with pytest.raises(checks.UserError, match=f"{root} is in use by a live run"):
            preprocess.preprocess(source, root)
    assert preprocess.preprocess(source, root) == {}


def test_a_case_whose_process_dies_is_named_and_the_others_go_on(tmp_path, monkeypatch):
    source, root = tmp_path / "source", tmp_path / "store"
    for case in ("bad", "good"):
        for name in ("ct", "segmentations"):
            file = source / case / f"{name}.nii.gz"
            file.parent.mkdir(parents=True, exist_ok=True)
            nib.save(nib.Nifti1Image(np.zeros((4, 4, 4), np.uint8), np.eye(4)), file)
    meta.add(source, {"bad": "train", "good": "train"})
    write = preprocess.write

    def die(root, case, **options):
        if case.name == "bad":
            os.kill(os.getpid(), signal.SIGKILL)
        return write(root, case, **options)

    monkeypatch.setattr(preprocess, "write", die)
    failed = preprocess.preprocess(source, root, workers=2)
    assert list(failed) == ["bad"] and "SIGKILL" in failed["bad"]
    assert [case.name for case in store.find_cases(root, split="train")] == ["good"]
