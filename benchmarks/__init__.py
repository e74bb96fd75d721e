"""Scripts that print a table; every figure of the README comes from one of them.

Each is `python -m benchmarks.NAME [--quick] [--json=FILE]`. The JSON is what `report`
returns: a flat `headline`, the rows, machine, versions and command.
"""

import json
import os
import platform
import sys
from importlib import metadata
from pathlib import Path

from absl import flags

# Imports no jax by itself: worker processes that read data import this file too.
PACKAGES = ("jax", "jaxlib", "flax", "torch", "monai", "soft-moe-pytorch")


def command_line() -> str:
    """Return the command line that repeats this run."""
    name = Path(sys.argv[0]).stem
    return " ".join([f"python -m benchmarks.{name}", *sys.argv[1:]])


def define_file(
    name: str, help: str, *, flag_values: flags.FlagValues = flags.FLAGS
) -> flags.FlagHolder:
    """Define a flag for a file to write, refused at once if its folder is missing."""
    holder = flags.DEFINE_string(name, None, help, flag_values=flag_values)
    flags.register_validator(
        name,
        lambda path: not path or Path(path).resolve().parent.is_dir(),
        message="lies in a folder that does not exist; make it first",
        flag_values=flag_values,
    )
    return holder


def machine() -> dict:
    """Describe what this process computes on: processor, cores it may use, devices."""
    import jax

    device = jax.devices()[0]
    return {
        "processor": processor(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gb": round(_memory_gb("MemTotal"), 1),
        "platform": device.platform,
        "device": device.device_kind,
        "devices": jax.device_count(),
    }


def processor() -> str:
    """Return the name of the CPU."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.split(":", 1)[1] for line in lines if line.startswith("model name")]
    return names[0].strip() if names else platform.processor() or platform.machine()


def available_gb() -> float:
    """Return the memory of the machine that is free for a process."""
    return _memory_gb("MemAvailable")


def _memory_gb(name):
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024 / 1e9
    return float("inf")


def versions() -> dict[str, str]:
    """Return the versions of Python and of the packages that are compared."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def report(headline: dict, **parts) -> dict:
    """Return what a benchmark writes: figures by flat names, parts, and where from."""
    return {
        "headline": headline,
        **parts,
        "machine": machine(),
        "versions": versions(),
        "command": command_line(),
    }


def write(path: str | None, found: dict) -> None:
    """Write a report, if there is a path."""
    if path:
        Path(path).write_text(json.dumps(found, indent=1) + "\n")
