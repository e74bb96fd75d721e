"""The scripts in launch/ with stand-ins for SLURM; see also test_docs_commands."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = sorted((ROOT / "launch").glob("slurm_*.sh"))
SRUN = """#!/bin/bash
echo "$@" > {folder}/srun.txt
[ -e {mark} ] && exit 3
{does}
"""
names = pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)


@pytest.fixture
def submit(tmp_path):
    """Run a script; return its status, what srun was given, and whether it requeued."""
    mark = tmp_path / "runs" / "a" / "requeue"
    mark.parent.mkdir(parents=True)

    def submit(script, *flags, does="", **variables):
        srun = SRUN.format(folder=tmp_path, mark=mark, does=does.format(mark=mark))
        scontrol = f'#!/bin/bash\necho "$@" > {tmp_path}/scontrol.txt\n'
        for name, text in (("srun", srun), ("scontrol", scontrol)):
            (tmp_path / name).write_text(text)
            (tmp_path / name).chmod(0o755)
        known = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_JOB_ID": "4711"}
        done = subprocess.run(
            ["bash", script, *flags], cwd=tmp_path, env=os.environ | known | variables
        )
        asked = tmp_path / "scontrol.txt"
        again = asked.read_text() if asked.exists() else ""
        return done.returncode, (tmp_path / "srun.txt").read_text(), again

    return submit


@names
def test_a_job_is_requeued_by_the_mark_and_not_by_a_status(submit, tmp_path, script):
    workdir = f"--workdir={tmp_path}/runs/a"
    status, _, again = submit(script, workdir, does="exit 75")
    assert (status, again) == (75, "")
    for more in ({}, {"WORKDIR": f"{tmp_path}/runs/a"}):
        (tmp_path / "scontrol.txt").unlink(missing_ok=True)
        flags = () if more else (workdir,)
        # an older mark is gone before; --kill-on-bad-exit may hide the status
        status, _, again = submit(script, *flags, does="touch {mark}; exit 137", **more)
        assert (status, again) == (137, "requeue 4711\n")


@names
def test_variables_and_flags_arrive(submit, script):
    variables = {"CONFIG": "configs/demo.py", "DATA": "data/x", "PYTHON": "py"}
    _, said, _ = submit(script, "--config.training.seed=1", **variables)
    for words in ("py train.py", "--config=configs/demo.py", "--workdir=runs/demo"):
        assert words in said
    assert "--config.data.root=data/x" in said
    assert said.rstrip().endswith("--config.training.seed=1")


def test_each_variable_stands_in_the_documentation():
    page = (ROOT / "docs" / "multi_node.md").read_text()
    rows = dict(re.findall(r"^\| `([A-Z_]+)` \| `?([^`|]*?)`? \|", page, re.MULTILINE))
    for script in SCRIPTS:
        given = re.findall(r"(\w+)=\$\{\1:-([^}]*)\}", script.read_text())
        for name, default in given:
            default = default.replace("$PWD/", "")
            default = "runs/<name of the config>" if "$" in default else default
            assert rows[name] == default, (script, name)


@pytest.mark.parametrize(
    "script", sorted((ROOT / "launch").glob("*.sh")), ids=lambda path: path.stem
)
def test_shellcheck_finds_nothing(script):
    shellcheck = shutil.which("shellcheck", path=Path(sys.executable).parent)
    if shellcheck is None:
        pytest.skip("needs shellcheck, of the extra dev")
    subprocess.run([shellcheck, script], check=True)
