import json
import math

import jax

from swinsmt_jax.training import logs
from swinsmt_jax.training.cost import Cost


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


def test_other_processes_write_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    with logs.open_log(tmp_path, start=0, stop=3) as log:
        assert log is None
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
