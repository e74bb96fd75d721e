import json
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import gpu_check

ROOT = Path(__file__).resolve().parents[1]


def test_a_step_without_memory_is_a_row_and_others_go_on(monkeypatch):
    def timed(config):
        if config.data.patch_shape[0] == gpu_check.SMALL_SIDES[0]:
            raise RuntimeError("RESOURCE_EXHAUSTED: no 80 GB")
        return {"step_s": 1.0, "compiled_gb": 2.0}

    monkeypatch.setattr(gpu_check, "_timed_step", timed)
    rows = list(gpu_check.step_rows(small=True))
    assert [r["devices"] for r in rows] == [1, 8, 1, 8]  # the tests' eight devices
    assert [r["status"] for r in rows] == ["out of memory"] * 2 + ["ok"] * 2
    assert "out of memory" in gpu_check.step_line(rows[0])
    assert gpu_check.is_fine([{"ok": True}], rows)
    assert gpu_check.headline([{"ok": True}], rows)["step_64_8_s"] == 1.0


def test_other_failures_and_deviations_are_not_fine(monkeypatch):
    def timed(config):
        raise ValueError("wrong")

    monkeypatch.setattr(gpu_check, "_timed_step", timed)
    row = gpu_check.step_row(side=32, devices=1, small=True)
    assert row["status"] == "failed: wrong" and not gpu_check.is_fine([], [row])
    assert not gpu_check.is_fine([{"ok": False}], [])


@pytest.mark.slow
def test_the_command_runs_to_its_end(shared, tmp_path):
    report = tmp_path / "report.json"
    command = ["benchmarks/gpu_check.py", "--quick", f"--json={report}"]
    command += [f"--goldens={shared / 'parity'}"]
    subprocess.run([sys.executable, *command], check=True, cwd=ROOT)
    found = json.loads(report.read_text())
    assert found["headline"]["parity_beyond"] == 0 < found["headline"]["parity_figures"]
    assert all(row["step_s"] > 0 for row in found["steps"])
