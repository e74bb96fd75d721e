"""Worker processes that die, whose parent dies, and two runs at once."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from swinsmt_jax import checks
from swinsmt_jax.data import meta, preprocess, store

DIE = "__import__('os')._exit(1)"


def test_a_process_that_dies_fails_its_case_alone():
    """The cases are expressions, and `eval` works on them."""
    cases = ["None", DIE, "'bad'", "str(1)", "str(2)"]
    found = dict(preprocess.run_each(eval, cases, 2))
    assert "its worker process has died" in found.pop(DIE)
    assert "--workers" in preprocess.DIED
    assert found == {"None": None, "'bad'": "bad", "str(1)": "1", "str(2)": "2"}


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="needs Linux's /proc")
def test_processes_end_with_a_parent_that_is_killed():
    code = (
        "import time; from swinsmt_jax.data import preprocess\n"
        "list(preprocess.run_each(time.sleep, [600, 600], 2))"
    )
    root = Path(__file__).parents[2]
    parent = subprocess.Popen([sys.executable, "-c", code], cwd=root)
    listed = Path(f"/proc/{parent.pid}/task/{parent.pid}/children")
    wait_for(lambda: len(listed.read_text().split()) >= 3)  # and a resource tracker
    children = listed.read_text().split()
    time.sleep(1)  # until they work
    os.kill(parent.pid, signal.SIGKILL)
    parent.wait()
    try:
        wait_for(lambda: not any(map(runs, children)))
    finally:
        for child in filter(runs, children):
            os.kill(int(child), signal.SIGKILL)


def runs(process):
    try:
        return (
            Path(f"/proc/{process}/stat").read_text().split(")")[-1].split()[0] != "Z"
        )
    except OSError:
        return False


def wait_for(condition):
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


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
