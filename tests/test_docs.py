"""The documentation cites benchmarks that are there, with flags that they have."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
CITING = [*(ROOT / "docs").glob("*.md"), ROOT / "README.md", ROOT / "Makefile"]
CITED = r"benchmarks[./](\w+)(?:\.py)?((?:\s+(?:\\\n\s*)?--[^\s`,)]+)*)"
BENCHMARKS = sorted(
    file.stem
    for file in (ROOT / "benchmarks").glob("*.py")
    if "    run(main, quick=" in file.read_text()
)


def cited():
    """The benchmarks that documentation names, with the flags given there."""
    found = {}
    for file in CITING:
        for name, rest in re.findall(CITED, file.read_text()):
            if name not in ("results", "NOTES"):
                found.setdefault(name, set()).update(re.findall(r"--(\w+)", rest))
    return found


def test_every_benchmark_that_is_cited_exists():
    assert len(cited()) >= 10 and cited().keys() <= set(BENCHMARKS)


@pytest.mark.parametrize("name", BENCHMARKS)
def test_every_benchmark_has_the_flags_that_are_said(name):
    """Those of its docstring and of the documentation, --quick and --json."""
    text = ast.get_docstring(ast.parse((ROOT / f"benchmarks/{name}.py").read_text()))
    said = set(re.findall(r"--(\w+)", text))
    assert {"quick", "json"} <= said and f"python -m benchmarks.{name}" in text
    command = [sys.executable, "-m", f"benchmarks.{name}", "--help"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    has = set(re.findall(r"^  --(?:\[no\])?(\w+)", done.stdout, re.MULTILINE))
    has |= {f"no{flag}" for flag in has}
    assert said | cited().get(name, set()) <= has, done.stderr
