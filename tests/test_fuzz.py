"""Readers of strangers' files give something or one line; see `tests/fuzz.py`."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
KINDS = [
    *("pt", "pt archive", "safetensors", "nifti 1", "nifti 2", "dicom", "network"),
    *("description", "groups", "config", "store"),
]


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs Linux's /proc")
@pytest.mark.parametrize("kind", KINDS)
def test_a_changed_file_is_read_or_refused_in_one_line(kind):
    command = [sys.executable, "-m", "tests.fuzz", kind, "100"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
