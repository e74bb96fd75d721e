"""What the soak says of commands that break its rules."""

import json
import random
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import soak

ROOT = Path(__file__).parents[1]
WHOLE = "(out / 'a').write_text('whole'); (out / 'b').write_text('whole')"


def found(output):
    return {f.name: f.read_text() for f in output.glob("[!.]*") if f.is_file()}


class Script(soak.Command):
    """Runs Python in place of a command."""

    def start(self, folder, output):
        output.mkdir(exist_ok=True)
        code = f"from pathlib import Path; out = Path({str(output)!r}); {self.line}"
        with (folder / "said.txt").open("w") as said:
            return subprocess.Popen(
                [sys.executable, "-c", code], stderr=said, start_new_session=True
            )


@pytest.mark.parametrize(
    "line, before, wrong",
    [
        (WHOLE, {}, []),
        (WHOLE, {"a": "whole"}, []),
        ("(out / 'a').write_text('whole')", {}, ["b is missing"]),
        ("(out / 'a').write_text('half')", {}, ["a differs", "b is missing"]),
        (f"{WHOLE}; (out / '.partial-c').touch()", {}, [".partial-c is left"]),
        (f"{WHOLE}; raise SystemExit(3)", {}, ["status 3: "]),
        ("raise SystemExit(1)", {"a": "whole"}, ["status 1: ", "a is lost"]),
        (
            f"{WHOLE}; import subprocess; subprocess.Popen(['sleep', '3'])",
            {},
            ["processes are left"],
        ),
    ],
)
def test_each_rule_can_be_broken(tmp_path, monkeypatch, line, before, wrong):
    monkeypatch.setattr(soak, "COMMANDS", {"x": Script(line, found)})
    monkeypatch.setattr(soak, "PATIENCE", 1)
    whole = {"seconds": 60, "found": {"a": "whole", "b": "whole"}}
    (tmp_path / "x.json").write_text(json.dumps(whole))
    (tmp_path / "x_before.json").write_text(json.dumps(before))
    told = soak.live("x", tmp_path, random.Random(0))["wrong"]
    assert len(told) == len(wrong)
    assert all(words in said for words, said in zip(wrong, told, strict=True)), told


def test_a_kill_is_a_life_that_a_signal_ended(tmp_path):
    life = {"command": "x", "things": 3, "seconds": 60, "passed_over": False}
    lives = [
        life | {"signal": "SIGKILL", "status": -9, "wrong": []},
        life | {"signal": "SIGTERM", "status": 0, "wrong": []},  # it was at its end
        life | {"signal": None, "status": 0, "wrong": ["a is missing"]},
    ]
    told = soak.summary(lives)
    assert (told["kills"], told["ended_whole"], told["wrong"]) == (1, 2, 1)
    assert told["minutes"] == 3 and told["things_compared"] == 9


def test_the_docs_state_the_figures_of_several_processes():
    file = ROOT / "benchmarks" / "results" / "soak_processes_cpu.json"
    told = json.loads(file.read_text())["headline"]
    text = " ".join((ROOT / "docs" / "multi_node.md").read_text().split())
    assert f"{told['lives']} lives, {told['of_2']} of two processes" in text
    assert f"at most {told['most_lost_killed']} steps were lost" in text
    assert told["most_lost_asked"] == told["wrong"] == 0


def test_the_docs_state_the_committed_figures():
    file = ROOT / "benchmarks" / "results" / "soak_cpu.json"
    told = json.loads(file.read_text())["headline"]
    text = (ROOT / "docs" / "reliability.md").read_text()
    assert f"In {told['minutes']:.0f} minutes" in text
    assert f"{told['kills']} kills" in text and told["kills"] >= 200
    assert told["wrong"] == 0
