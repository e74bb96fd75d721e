import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

import benchmarks
from benchmarks import gpu_check, gpu_parts

ROOT = Path(__file__).resolve().parents[1]
NOTHING = {"steps": [], "profile": [], "parity": [], "commands": []}


def test_a_step_without_memory_is_a_row_and_others_go_on(monkeypatch):
    def timed(config):
        if config.data.patch_shape[0] == gpu_parts.SMALL_SIDES[0]:
            raise RuntimeError("RESOURCE_EXHAUSTED: no 80 GB")
        return {"step_s": 1.0, "patches_per_s": float(config.data.batch_size)}

    monkeypatch.setattr(gpu_parts, "_timed_step", timed)
    rows = list(gpu_parts.step_rows([], small=True))
    assert [r["devices"] for r in rows] == [1, 8, 1, 8, 1, 1]  # of the tests' eight
    assert [r["status"] for r in rows] == ["out of memory"] * 2 + ["ok"] * 4
    assert "out of memory" in gpu_parts.step_line(rows[0])
    found = NOTHING | {"parity": [{"ok": True}], "steps": rows}
    assert gpu_parts.is_fine(found)
    figures = gpu_parts.headline(found)
    assert figures["32_8_s"] == 1.0
    assert figures["32_1_batch2_patches_per_s"] == 2.0
    assert figures["32_1_batch4_patches_per_s"] == 4.0
    assert list(gpu_parts.step_rows(rows[1:-1], small=True)) == [rows[0], rows[-1]]


def test_other_failures_and_deviations_are_not_fine(monkeypatch):
    def timed(config):
        raise ValueError("wrong")

    monkeypatch.setattr(gpu_parts, "_timed_step", timed)
    row = gpu_parts.step_row({"side": 32, "devices": 1, "batch": 1}, small=True)
    assert row["status"] == "failed: wrong"
    assert not gpu_parts.is_fine(NOTHING | {"steps": [row]})
    assert not gpu_parts.is_fine(NOTHING | {"parity": [{"ok": False}]})
    assert not gpu_parts.is_fine(NOTHING | {"commands": [{"status": 2}]})


def test_the_setting_tells_code_goldens_and_versions(tmp_path):
    here = gpu_check.setting(quick=True, goldens=tmp_path)
    there = gpu_check.setting(quick=True, goldens=tmp_path / "missing")
    assert here["goldens"] and not there["goldens"]
    assert here["sources"] == there["sources"] and "jax" in here["versions"]


def test_a_change_of_the_code_changes_its_digest(tmp_path):
    file = tmp_path / "benchmarks" / "a.py"
    file.parent.mkdir()
    file.write_text("x = 1")
    before = gpu_check.digest(tmp_path)
    file.write_text("x = 2")
    assert gpu_check.digest(tmp_path) != before


WRITES = "import sys; open(sys.argv[-1].split('=')[1], 'w').write('{\"headline\": {}}')"


def test_a_part_that_is_done_is_not_done_again(tmp_path):
    file = tmp_path / "part.json"
    command = [sys.executable, "-c", WRITES]
    here, there = {"gpus_and_driver": []}, {"gpus_and_driver": ["NVIDIA H100, 580"]}
    done = gpu_check.run_part(command, file, limit=60, about=here)
    assert done["status"] == "ok" and done["setting"] == here
    refused = [sys.executable, "-c", "raise SystemExit(1)"]
    found = gpu_check.run_part(refused, file, limit=60, about=here)
    assert found == done | {"status": "done before"}
    found = gpu_check.run_part(refused, file, limit=60, about=there)
    assert found["status"] == "failed with status 1"  # not taken for another device's


@pytest.mark.slow
def test_a_part_that_runs_over_is_ended_with_what_it_started(tmp_path):
    marker = tmp_path / "marker"
    late = f"import time; time.sleep(4); open({str(marker)!r}, 'w')"
    code = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {late!r}])"
    command = [sys.executable, "-c", code]
    gpu_check.run_part(command, tmp_path / "part.json", limit=2, about={})
    time.sleep(4)
    assert not marker.exists()


@pytest.mark.parametrize(
    ("more", "said"),
    [("; raise SystemExit(3)", "status 3"), ("; input()", gpu_check.LEFT)],
)
def test_a_part_that_fails_or_runs_over_keeps_what_it_found(tmp_path, more, said):
    file = tmp_path / "part.json"
    wait = more.replace("input()", "import time; time.sleep(60)")
    found = gpu_check.run_part(
        [sys.executable, "-c", WRITES + wait], file, limit=3, about={}
    )
    assert said in found["status"] and found["headline"] == {}
    assert not file.exists()


class Options:
    minutes, json, output, goldens = 0.07, None, "", "none"
    parts, quick, redo = ["model", "profile", "commands"], True, False


def test_a_part_slower_than_its_limit_does_not_keep_the_others_back(
    tmp_path, monkeypatch
):
    """It adds a row in each call, and is done in the third."""
    slow = """
import json, os, sys, time
file = sys.argv[-1].split("=")[1]
rows = json.load(open(file))["rows"] if os.path.exists(file) else []
rows.append(os.environ["JAX_COMPILATION_CACHE_DIR"])
json.dump({"headline": {"rows": len(rows)}, "rows": rows}, open(file, "w"))
time.sleep(60 if len(rows) < 3 else 0)
"""

    def command_of(part, options):
        return [sys.executable, "-c", slow if part == "model" else WRITES]

    monkeypatch.setattr(gpu_check, "command_of", command_of)
    monkeypatch.setattr(gpu_check, "LEAST", 0.5)
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR", raising=False)
    Options.output, Options.json = str(tmp_path), str(tmp_path / "report.json")
    found = []
    for Options.minutes in (0.07, 0.07, 1):
        assert gpu_check.main(Options) == 0
        found.append(benchmarks.read(Options.json))
    statuses = [
        {
            name: part["status"].split(",")[-1].strip()
            for name, part in f["parts"].items()
        }
        for f in found
    ]
    left, before = gpu_check.LEFT, "done before"
    assert statuses[0] == dict.fromkeys(Options.parts, left)
    assert statuses[1] == {"profile": "ok", "commands": "ok", "model": left}
    assert statuses[2] == {"profile": before, "commands": before, "model": "ok"}
    assert [f["headline"]["model_rows"] for f in found] == [1, 2, 3]
    assert found[2]["parts"]["model"]["rows"] == [str(tmp_path / "cache")] * 3
    assert not [*tmp_path.glob("*.begun.json"), *tmp_path.glob("*.unfinished.json")]


def test_rows_of_another_setting_are_not_gone_on_with(tmp_path):
    file = tmp_path / "part.json"
    fails = [sys.executable, "-c", WRITES + "; raise SystemExit(3)"]
    gpu_check.run_part(fails, file, limit=60, about={"sources": "a"})
    assert gpu_check.times_begun(file, {"sources": "a"}) == 1
    refused = [sys.executable, "-c", "raise SystemExit(3)"]
    found = gpu_check.run_part(refused, file, limit=60, about={"sources": "a"})
    assert "headline" in found and gpu_check.times_begun(file, {"sources": "a"}) == 2
    found = gpu_check.run_part(refused, file, limit=60, about={"sources": "b"})
    assert "headline" not in found


@pytest.mark.slow
@pytest.mark.usefixtures("optimised")
def test_two_calls_do_all_that_one_has_no_time_for(shared, tmp_path):
    report = tmp_path / "report.json"
    command = ["benchmarks/gpu_check.py", "--quick", "--parts=steps,profile,parity"]
    command += [f"--goldens={shared / 'parity'}", f"--json={report}"]
    command += [f"--output={tmp_path}"]
    subprocess.run([sys.executable, *command, "--minutes=0"], check=True, cwd=ROOT)
    statuses = {
        part["status"] for part in json.loads(report.read_text())["parts"].values()
    }
    assert statuses == {gpu_check.LEFT}
    subprocess.run([sys.executable, *command, "--minutes=30"], check=True, cwd=ROOT)
    report = json.loads(report.read_text())
    assert report["headline"]["parity_beyond"] == 0
    assert report["headline"]["parity_figures"] > 0
    steps, profile = (report["parts"][name][name] for name in ("steps", "profile"))
    assert all(row["step_s"] > 0 and row["attention"]["windows"] for row in steps)
    assert [row["batch"] for row in steps if row["devices"] == 1] == [1, 1, 2, 4]
    stages = {row["stage"]: row["seconds"] for row in profile}
    assert stages["clock"] > 0 and stages["stage1"] > 0 and stages["decoder1"] > 0


@pytest.mark.slow
def test_the_products_own_commands_run_from_end_to_end(tmp_path):
    rows = gpu_parts.command_rows(tmp_path, small=True)
    assert [row["status"] for row in rows] == [0, 0, 0, 0]
    assert len([*(tmp_path / "predictions").glob("*.nii.gz")]) == 1
