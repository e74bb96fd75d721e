import json
import math
import re
import subprocess
import sys
from pathlib import Path

import jax

from swinsmt_jax.runtime.cost import Cost
from swinsmt_jax.training import logs


def test_rows_are_json_and_a_nan_is_null(tmp_path):
    with logs.open_log(tmp_path, start=0, stop=3) as log:
        log.progress({"loss": 1.5, "learning_rate": 0.1})
        log.row(1, {"loss": 1.5, "val_dice/ribs": math.nan})
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert json.loads(lines[0]) == {"step": 1, "loss": 1.5, "val_dice/ribs": None}
    assert any((tmp_path / "tensorboard").iterdir())


def test_a_continued_log_has_each_step_once(tmp_path):
    path = tmp_path / "metrics.jsonl"
    rows = [json.dumps({"step": s, "loss": 10.0 * s}) for s in (1, 2, 3, 4)]
    path.write_text("\n".join(rows) + '\n{"step": 5, "lo')  # killed while writing
    with logs.open_log(tmp_path, start=2, stop=4) as log:
        log.row(3, {"loss": -1.0})
    assert [(r["step"], r["loss"]) for r in logs.read_rows(path)] == [
        (1, 10.0),
        (2, 20.0),
        (3, -1.0),
    ]


def test_a_full_disk_is_told_by_metrics_and_never_waits_for_the_board(tmp_path):
    script = f"""
import pathlib, resource
from swinsmt_jax.training import logs
resource.setrlimit(resource.RLIMIT_FSIZE, (2000, -1))
try:
    with logs.open_log(pathlib.Path({str(tmp_path)!r}), start=0, stop=99) as log:
        for step in range(99):
            log.row(step, {{str(i): 1.0 for i in range(9)}})
except OSError as error:
    print(error.strerror, step)
"""
    done = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        timeout=120,
        cwd=Path(logs.__file__).parents[2],
    )
    assert done.returncode == 0, done.stderr
    assert re.match(r"(File too large|No space left on device) \d+", done.stdout)
    assert len(logs.read_rows(tmp_path / "metrics.jsonl")) >= 10


def test_what_is_added_to_a_step_joins_its_row(tmp_path):
    with logs.open_log(tmp_path, start=0, stop=3) as log:
        log.row(1, {"loss": 1.5})
        log.row(2, {"loss": 1.0})
        log.row(2, {"val_dice": 0.5})
    rows = [{"step": 1, "loss": 1.5}, {"step": 2, "loss": 1.0, "val_dice": 0.5}]
    assert logs.read_rows(tmp_path / "metrics.jsonl") == rows


def test_other_processes_write_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    with logs.open_log(tmp_path, start=0, stop=3) as log:
        log.progress({"loss": 1.5})
        log.row(1, {"loss": 1.5})
        log.say("nothing")
    assert not list(tmp_path.iterdir())


def test_the_clock_leaves_out_compilation_and_pauses(monkeypatch):
    now = iter([100.0, 101.0, 101.5, 102.0, 104.0, 1000.0, 1001.0])
    monkeypatch.setattr(logs.time, "perf_counter", lambda: next(now))
    cost = Cost(operations=3e12, arguments=1, temporaries=1, limit=None, peak=1.5e13)
    clock = logs.Clock(4, cost)
    assert clock.tick() == {}
    with clock.waiting():
        pass
    rates = {"tflops_per_second": 1.5, "utilisation": 0.1}
    assert clock.tick() == {"patches_per_second": 2, "input_wait": 0.25, **rates}
    assert clock.tick()["input_wait"] == 0.125  # of both steps
    clock.restart()
    rates = {"tflops_per_second": 3, "utilisation": 0.2}
    assert clock.tick() == {"patches_per_second": 4, "input_wait": 0, **rates}
