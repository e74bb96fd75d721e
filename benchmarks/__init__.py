"""Scripts that print a table; every figure of the documentation comes from one of them.

Each is `python -m benchmarks.NAME [--quick] [--json=FILE]`. The JSON is what `report`
returns: a flat `headline`, the rows, machine, versions and command.
"""

import json
import os
import platform
import subprocess
import sys
from collections.abc import Callable, Sequence
from importlib import metadata
from pathlib import Path

from absl import app, flags

# Imports no jax by itself: worker processes that read data import this file too.
PACKAGES = ("jax", "jaxlib", "flax", "torch", "monai", "soft-moe-pytorch")
ROOT = Path(__file__).resolve().parents[1]

flags.disclaim_key_flags()  # so that --help of a benchmark lists what is defined here


def command_line() -> str:
    """Return the command line that repeats this run."""
    name = Path(sys.argv[0]).stem
    return " ".join([f"python -m benchmarks.{name}", *sys.argv[1:]])


def define_file(
    name: str, help: str, *, flag_values: flags.FlagValues = flags.FLAGS
) -> None:
    """Define a flag for a file to write, refused at once if its folder is missing."""
    flags.DEFINE_string(name, None, help, flag_values=flag_values)
    flags.register_validator(
        name,
        lambda path: not path or Path(path).resolve().parent.is_dir(),
        message="lies in a folder that does not exist; make it first",
        flag_values=flag_values,
    )


def run(main: Callable, *, quick: str, devices: int = 0) -> None:
    """Define --quick and --json, and run a benchmark.

    Args:
        main: called with the parsed flags; a `UserError` ends it in one line.
        quick: what --quick does, for --help.
        devices: virtual devices of a CPU; 0 leaves it as it is, and a flag `devices`
            goes before.
    """
    flags.DEFINE_bool("quick", False, quick)
    define_file("json", "also write the figures to this file")

    def start(_):
        from swinsmt_jax.runtime import startup

        count = getattr(flags.FLAGS, "devices", devices)
        with startup.exit_on_user_error(f"benchmarks.{Path(sys.argv[0]).stem}"):
            if count > 1:
                _divide_cpu(count)
            return main(flags.FLAGS)

    app.run(start)


def _divide_cpu(count):
    import jax

    if jax.config.jax_platforms in (None, "", "cpu"):
        jax.config.update("jax_num_cpu_devices", count)


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


def gpus() -> list[str]:
    """Return name and driver of each NVIDIA GPU, without opening them."""
    query = ("nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader")
    return (output_of(*query) or "").splitlines()


def output_of(*command: str) -> str | None:
    """Return what a command prints, or None if it fails or is not there."""
    try:
        found = subprocess.run(command, capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return found.stdout.strip() if found.returncode == 0 else None


def processor() -> str:
    """Return the name of the CPU."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.split(":", 1)[1] for line in lines if line.startswith("model name")]
    return names[0].strip() if names else platform.processor() or platform.machine()


def memory_limit_gb(wanted: float = float("inf")) -> float:
    """Return the accelerator's memory, or what is free on a CPU; at most `wanted`."""
    import jax

    device = jax.devices()[0]
    if device.platform == "cpu":
        return min(wanted, _memory_gb("MemAvailable") - 1)
    limit = (device.memory_stats() or {}).get("bytes_limit", float("inf"))
    return min(wanted, limit / 1e9)


def _memory_gb(name):
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024 / 1e9
    return float("inf")


def process_bytes(field: str) -> int:
    """Return the memory of this process by a field of Linux, such as VmRSS."""
    status = Path("/proc/self/status").read_text()
    return int(status.split(f"{field}:")[1].split()[0]) * 1024


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


def write(path: str | Path | None, found: dict) -> None:
    """Write a report, if there is a path; a process that is killed leaves it whole."""
    from swinsmt_jax.runtime.files import replacing

    if path:
        with replacing(Path(path).resolve()) as partial:
            partial.write_text(json.dumps(found, indent=1) + "\n")


def read(path: str | Path | None) -> dict:
    """Return a report; {} if there is none or it is no JSON."""
    try:
        return json.loads(Path(path).read_text()) if path else {}
    except (OSError, ValueError):
        return {}


def save(headline: dict, **parts) -> None:
    """Write a report to the file of --json, if it is given."""
    if flags.FLAGS.json:
        write(flags.FLAGS.json, report(headline, **parts))


def show(headline: dict) -> None:
    """Print a headline."""
    print(json.dumps(headline, indent=1), flush=True)


def markdown_table(header: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """Return a table in Markdown, all but its first column set to the right."""
    rule = ("---", *("---:",) * (len(header) - 1))
    return "".join(f"| {' | '.join(row)} |\n" for row in (header, rule, *lines))
