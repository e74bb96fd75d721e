import importlib
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from swinsmt_jax import cli
from swinsmt_jax.runtime import statuses

ROOT = Path(__file__).parents[1]
CALL = "from swinsmt_jax import cli; cli.main()"


def call(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["/usr/bin/swinsmt", *arguments])
    cli.main()


def loaded_by(program, *arguments):
    """Return the modules that a program in a process of its own has loaded."""
    program += "\nfinally:\n    import sys; print('loaded', *sys.modules)"
    program = "try:\n    " + program
    command = [sys.executable, "-c", program, *arguments]
    out = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    return set(out.stdout.split("loaded", 1)[1].split())


@pytest.mark.parametrize("arguments", [(), ("--help",)])
def test_all_commands_are_listed(monkeypatch, capsys, arguments):
    call(monkeypatch, *arguments)
    listed = capsys.readouterr().out.splitlines()
    for name, (_, words) in cli.COMMANDS.items():
        assert f"  {name:12} {words}" in listed


def test_an_unknown_command_is_refused(monkeypatch, capsys):
    with pytest.raises(SystemExit, match="2"):
        call(monkeypatch, "predikt")
    assert "Did you mean 'predict'" in capsys.readouterr().err


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_each_command_is_there(name):
    module = importlib.import_module(f"swinsmt_jax.{cli.COMMANDS[name][0]}")
    assert callable(module.main) and module.__doc__


def test_help_lists_the_flags_of_a_command():
    command = [sys.executable, "-c", CALL, "convert", "--help"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0
    assert "Weights of PyTorch to a workdir" in result.stdout
    for flag in ("config", "weights", "workdir"):
        assert f"\n  --{flag}: " in result.stdout


def test_errors_name_the_command(tmp_path):
    command = [sys.executable, "-c", CALL, "export", f"--workdir={tmp_path}"]
    result = subprocess.run(
        [*command, "--output=x.npz"], cwd=ROOT, capture_output=True, text=True
    )
    assert result.returncode == 2
    assert result.stderr.splitlines()[-1].startswith(f"swinsmt export: {tmp_path}")


@pytest.mark.parametrize("name", ["phantoms", "import-scan"])
def test_light_commands_load_no_jax(name):
    assert "jax" not in loaded_by(CALL, name, "--help")


@pytest.mark.parametrize(
    "program, absent",
    [
        ("import swinsmt_jax", {"jax", "numpy"}),
        ("from swinsmt_jax import SwinSMTConfig", {"grain", "nibabel"}),
        ("from swinsmt_jax import load", {"grain", "nibabel", "scipy.ndimage"}),
    ],
)
def test_the_package_loads_what_is_asked_for_alone(program, absent):
    loaded = loaded_by(program)
    assert "swinsmt_jax" in loaded
    assert not loaded & ({"matplotlib", "tensorboardX", "orbax"} | absent)


FOREVER = """
import os, signal, sys, time
from swinsmt_jax.runtime import files, statuses
from pathlib import Path
with statuses.ending_at_signals("predict.py"), files.replacing(Path(sys.argv[2])) as p:
    p.write_text("half")
    os.kill(os.getpid(), getattr(signal, sys.argv[1]))
    time.sleep(60)
"""


@pytest.mark.parametrize(
    "name, status", [("SIGTERM", 75), ("SIGUSR1", 75), ("SIGINT", 130)]
)
def test_a_signal_ends_a_command_in_one_line_with_its_status(name, status, tmp_path):
    command = [sys.executable, "-c", FOREVER, name, str(tmp_path / "file")]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == status
    (line,) = result.stderr.splitlines()
    assert line.startswith(f"predict.py: {name} received") and "continues" in line
    assert list(tmp_path.iterdir()) == []


def test_each_command_listens_for_signals(monkeypatch):
    """Also while it imports what it needs; train.py listens itself in its steps."""
    seen = {}
    monkeypatch.setattr(
        cli.importlib,
        "import_module",
        lambda _: seen.update({n: signal.getsignal(n) for n in statuses.STATUS}),
    )
    before = {number: signal.getsignal(number) for number in statuses.STATUS}
    with pytest.raises(AttributeError):  # of None, which is not a module
        cli.run("predict", program="predict.py")
    assert len(seen) == 3 and not set(seen.values()) & set(before.values())
    assert {number: signal.getsignal(number) for number in statuses.STATUS} == before
