"""`benchmarks.demo`, with stand-ins for train.py and evaluate.py."""

import json

import pytest

from benchmarks import demo

TRAIN = """
import pathlib, sys
flags = dict(f[2:].split("=", 1) for f in sys.argv[1:])
pathlib.Path(flags["workdir"]).mkdir(parents=True, exist_ok=True)
pathlib.Path(flags["workdir"], "seed").write_text(flags["config.training.seed"])
"""
EVALUATE = """
import json, pathlib, sys
flags = dict(f[2:].split("=", 1) for f in sys.argv[1:])
seed = int(pathlib.Path(flags["workdir"], "seed").read_text())
less = flags["data_root"].endswith("others") / 10
output = pathlib.Path(flags["output"])
output.mkdir()
dice = {"ribs": 0.5, "overall": 0.7 + seed / 100 - less}
(output / "results.json").write_text(json.dumps({"dice": dice}))
"""


def test_each_seed_is_trained_and_tested_on_both_folders(monkeypatch, tmp_path, capsys):
    for name, text in (("train.py", TRAIN), ("evaluate.py", EVALUATE)):
        (tmp_path / name).write_text(text)
    monkeypatch.setattr(demo, "ROOT", tmp_path)
    monkeypatch.setattr(demo, "save", lambda headline, rows: reports.append(rows))

    class Options:
        quick, seeds, workdir = False, ["3", "7"], str(tmp_path / "runs")
        root, others = str(tmp_path / "root"), str(tmp_path / "others")

    reports = []
    demo.main(Options)
    printed = capsys.readouterr().out
    assert "| 7, others | 50.0 | 67.0 |" in printed
    found = json.loads(printed[printed.index("{") :])
    assert found == pytest.approx(
        {
            **{"dice_mean": 75, "dice_worst": 73},
            **{"dice_others_mean": 65, "dice_others_worst": 63},
        }
    )
    assert [row["seed"] for row in reports[-1]] == [3, 7]
    assert reports[-1][0]["seconds"] > 0
    assert demo.train(3, root=tmp_path, workdir=tmp_path, small=False) is None
