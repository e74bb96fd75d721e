"""run.json: a summary of the run in a workdir.

It has one entry for each start: time, host, command, revision, package versions, data,
devices and first step.
"""

import datetime
import importlib.metadata
import os
import platform
import subprocess
import sys
from pathlib import Path

import jax

from swinsmt_jax import checks
from swinsmt_jax.runtime import processes
from swinsmt_jax.runtime.files import read_json, write_json

FILE = "run.json"
PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy")


def add_start(workdir: Path, facts: dict) -> None:
    """Add an entry with these facts and those of machine and software.

    Of several processes the first one does so.

    Raises:
        UserError: for a `run.json` that is none, or cannot be written.
    """
    if not processes.is_first():
        return
    file = workdir / FILE
    starts = read(file) if file.exists() else []
    device = jax.devices()[0]
    entry = {
        "started": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": sys.argv,
        "host": platform.node(),
        "processes": jax.process_count(),
        "device": device.device_kind,
        "xla_flags": os.environ.get("XLA_FLAGS", ""),
        "revision": revision(),
        "python": platform.python_version(),
        "packages": {name: importlib.metadata.version(name) for name in PACKAGES},
        **facts,
    }
    write_json(file, {"starts": [*starts, entry]})


def add(workdir: Path, facts: dict) -> None:
    """Add facts to the entry of the latest start."""
    file = workdir / FILE
    *before, last = read(file)
    write_json(file, {"starts": [*before, last | facts]})


def read(file: Path) -> list[dict]:
    """Return the entries of a run.json, the first start first."""
    try:
        return list(read_json(file)["starts"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise checks.UserError(
            f"{file} is not the record of a run ({error}); remove it: only the "
            "list of earlier starts is lost."
        ) from error


def revision() -> str | None:
    """Return the git revision of this code, "+changes" if it was edited since."""
    root = Path(__file__).parents[2]
    if not (root / ".git").exists():
        return None

    def git(*arguments):
        command = ["git", "-C", str(root), *arguments]
        return subprocess.run(
            command, capture_output=True, text=True, check=True
        ).stdout

    try:
        edited = git("status", "--porcelain", "--untracked-files=no").strip()
        return git("rev-parse", "HEAD").strip() + ("+changes" if edited else "")
    except (OSError, subprocess.CalledProcessError):
        return None
