"""Several processes that segment the scans of one folder, and killed ones."""

import json
import subprocess
import sys
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from swinsmt_jax.inference import scans, shared
from swinsmt_jax.inference.outputs import OutputOptions
from swinsmt_jax.inference.scans import segment_scans
from swinsmt_jax.runtime.files import Claim
from tests.inference.test_scans import make

ROOT = Path(__file__).parents[2]
HOLD = """
import sys
from pathlib import Path
from swinsmt_jax.runtime import files
with files.claimed(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""
TELL = """
import sys
from pathlib import Path
from swinsmt_jax.inference import shared
for i in range(20):
    shared.tell(Path(sys.argv[1]), sys.argv[2] + str(i), {"file": "x" * 1000})
"""


def start(program, *arguments):
    return subprocess.Popen(
        [sys.executable, "-c", program, *map(str, arguments)],
        **{"cwd": ROOT, "text": True},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )


@pytest.fixture
def folder(tmp_path, rng):
    """{name: file} of three scans."""
    hu = (rng.integers(0, 4, (8, 9, 10)) * 250 + 125).astype(np.int16)
    files = {name: tmp_path / f"{name}.nii" for name in "abc"}
    for file in files.values():
        nib.save(nib.Nifti1Image(hu, np.eye(4)), file)
    return files


def names_in(output):
    return sorted(path.name for path in output.iterdir())


def test_no_entry_of_several_processes_is_lost(tmp_path):
    processes = [start(TELL, tmp_path, name) for name in "abc"]
    assert [process.wait() for process in processes] == [0, 0, 0]
    for process in processes:
        process.communicate()
    found = json.loads((tmp_path / "summary.json").read_text())
    assert sorted(found) == sorted(f"{n}{i}" for n in "abc" for i in range(20))
    assert names_in(tmp_path) == ["summary.json"]


def test_what_another_process_works_on_comes_last(tmp_path, monkeypatch):
    lock = tmp_path / ".lock-a"
    holder = start(HOLD, lock)
    assert holder.stdout.readline() == "held\n"
    monkeypatch.setattr(shared, "PATIENCE", 0.01)
    seen = []
    for name, claim in shared.turns(tmp_path, "abc"):
        seen.append((name, claim))
        assert (tmp_path / f".lock-{name}").exists()
        if len(seen) == 2:
            holder.communicate("")  # ends
    assert seen == [(name, Claim.FREE) for name in "bca"]
    assert names_in(tmp_path) == []


def test_what_another_process_has_done_meanwhile_is_not_done_twice(
    tmp_path, folder, monkeypatch
):
    """Also with --overwrite, which means what was there when the process began."""
    output = tmp_path / "out"
    segment_scans(make(), folder, output, OutputOptions())
    anew = OutputOptions(overwrite=True)
    one = {"b": folder["b"]}
    turns = shared.turns

    def as_the_other_ends(*arguments):
        monkeypatch.setattr(shared, "turns", turns)
        assert "seconds" in segment_scans(make(), one, output, anew)["b"]
        return turns(*arguments)

    monkeypatch.setattr(shared, "turns", as_the_other_ends)
    found = segment_scans(make(), folder, output, anew)
    assert [name for name in found if "seconds" in found[name]] == ["a", "c"]


def test_a_scan_whose_process_was_killed_is_passed_over_once(
    tmp_path, folder, monkeypatch
):
    output = tmp_path / "out"
    killed = f"""
import os, sys
sys.path.insert(0, {str(ROOT)!r})
from pathlib import Path
from tests.inference import test_shared
from swinsmt_jax.inference import scans
def die(*_):
    (Path({str(output)!r}) / ".partial-b.nii.gz-abcdefgh").mkdir()
    os.kill(os.getpid(), 9)
segment = scans._segment
scans._segment = lambda s, file, *rest: (die if file.stem == "b" else segment)(
    s, file, *rest)
scans.segment_scans(test_shared.make(), { ({k: str(v) for k, v in folder.items()}) },
    {str(output)!r}, scans.OutputOptions())
"""
    process = start(killed)
    process.communicate()
    assert process.returncode == -9
    left = names_in(output)
    assert left == [".lock-b", ".partial-b.nii.gz-abcdefgh", "a.nii.gz", "summary.json"]
    found = segment_scans(make(), folder, output, OutputOptions())
    assert "skipped this time" in found["b"]["error"] and "seconds" in found["c"]
    record = json.loads((output / "summary.json").read_text())
    assert record["b"]["error"] == found["b"]["error"]
    assert names_in(output) == ["a.nii.gz", "c.nii.gz", "summary.json"]
    found = segment_scans(make(), folder, output, OutputOptions())
    assert "seconds" in found["b"] and "error" not in found["b"]


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit])
def test_a_scan_whose_process_was_asked_to_end_is_taken_again(
    tmp_path, folder, monkeypatch, error
):
    with monkeypatch.context() as patch, pytest.raises(error):
        patch.setattr(scans, "_segment", lambda *_: (_ for _ in ()).throw(error))
        segment_scans(make(), folder, tmp_path / "out", OutputOptions())
    assert names_in(tmp_path / "out") == ["summary.json"]
    found = segment_scans(make(), folder, tmp_path / "out", OutputOptions())
    assert all("seconds" in entry for entry in found.values())
