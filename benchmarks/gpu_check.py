"""Is this machine's GPU right, how fast is it, and what fits? One command.

    python -m benchmarks.gpu_check [--json=FILE] [--output=runs/gpu_check] [--redo]

Six parts, each a process with a limit of its own, together under eight minutes:

network: the network, its modules, loss and sliding window against the golden tensors of
    PyTorch (benchmarks/parity.py; skipped without --goldens) on this machine's device,
    in float32 with the highest precision of matrix products and in bfloat16. An
    accelerator adds up in another order than a CPU, so it may deviate ten times as
    much. Before that training steps of the paper's Swin SMT in bfloat16, a random crop
    on each device, at 96^3 and 128^3, on one device and on all: time and memory. A step
    that needs too much memory is a row of the table, not the end of it.
model: against the PyTorch network, if it is installed, eager and compiled: patches/s,
    TFLOP/s, utilisation, memory (benchmarks/model.py --quick).
inference: a whole body with the paper's network (benchmarks/inference.py --quick).
soft_moe, input_pipeline: the benchmarks of these names, --quick.
largest_batch: the most patches of a step, ours and PyTorch's (skipped on a CPU).

A part that is done on this device, with this code, these packages and goldens, as
--quick or not, is not done again: a run that was stopped goes on, and
--parts=network,model takes some of them. On a CPU, and with --quick, the network and
crops of the first part are small, and with --quick those of the second, and no whole
networks are compared with goldens; the JSON says "small" and shows no GPU as its
setting. The limits are for a GPU; --limit sets another. Ends with status 1 if a figure
is beyond its tolerance, a step fails but for memory, or a part fails or runs over its
limit.
"""

import hashlib
import json
import os
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path

if __package__ in (None, ""):  # python benchmarks/gpu_check.py
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import jax
import numpy as np
from absl import flags

from benchmarks import (
    ROOT,
    command_line,
    parity,
    programs,
    report,
    run,
    versions,
    write,
)
from swinsmt_jax import sharding
from swinsmt_jax.config import from_config_dict
from swinsmt_jax.configs import swin_smt_paper
from swinsmt_jax.runtime import startup

SIDES, SMALL_SIDES = (96, 128), (32, 64)
STEPS = 5
ON_ACCELERATOR = 10  # times the tolerance of a CPU
LIMITS = {  # of each part on a GPU, seconds; in the order of what matters most
    "network": 125,
    "model": 130,
    "inference": 65,
    "soft_moe": 40,
    "input_pipeline": 30,
    "largest_batch": 85,
}
COMMANDS = {  # of the parts that are benchmarks; the host's sums are no GPU's figure
    "model": ("model", "--quick"),
    "inference": ("inference", "--quick", "--scans="),
    "soft_moe": ("soft_moe", "--quick"),
    "input_pipeline": ("input_pipeline", "--quick"),
    "largest_batch": ("model", "--largest_batch"),
}
SOURCES = ("swinsmt_jax", "benchmarks")
OUT_OF_MEMORY = ("RESOURCE_EXHAUSTED", "out of memory", "Out of memory")


def parity_rows(goldens: Path, *, quick: bool) -> list[dict]:
    """Measure the figures of `benchmarks.parity` on the default device."""
    factor = 1 if jax.default_backend() == "cpu" else ON_ACCELERATOR
    with jax.default_matmul_precision("highest"):
        figures = parity.all_figures(goldens, quick=quick)
    rows = []
    for figure in figures:
        tolerance = figure.tolerance * factor
        ok = bool(figure.value <= tolerance)
        rows.append({**figure._asdict(), "tolerance": tolerance, "ok": ok})
    return rows


def experiment(*, side: int, devices: int, small: bool):
    """Return the paper's experiment for one crop of `side` on each device."""
    values = swin_smt_paper.get_config()
    values.data.update({"patch_shape": (side,) * 3, "batch_size": devices})
    values.mesh.data = devices
    if small:
        values.model.update({"feature_size": 12, "num_experts": 4, "remat": ()})
        values.model.window_size = (4, 4, 4)
    return from_config_dict(values)


def step_row(*, side: int, devices: int, small: bool) -> dict:
    """Compile and time the training step; `status` says how it ended."""
    row = {"devices": devices, "side": side, "status": "ok"}
    try:
        row |= _timed_step(experiment(side=side, devices=devices, small=small))
    except Exception as error:  # of XLA: what it raises differs by platform
        message = str(error)
        memory = any(words in message for words in OUT_OF_MEMORY)
        row["status"] = "out of memory" if memory else f"failed: {message[:300]}"
    return row


def _timed_step(config) -> dict:
    mesh = sharding.make_mesh(config.mesh)
    step, like, initialize = programs.training_step(config, mesh)
    shape = (config.data.batch_size, *config.data.patch_shape)
    batch = programs.random_batch(shape, mesh, classes=config.model.out_channels)
    start = time.perf_counter()
    compiled = step.lower(like, batch).compile()
    compile_seconds = time.perf_counter() - start
    state, seconds = initialize(), []
    for _ in range(STEPS):
        start = time.perf_counter()
        state, metrics = compiled(state, batch)
        loss = float(metrics["loss"])
        seconds.append(time.perf_counter() - start)
    if not np.isfinite(loss):
        raise FloatingPointError(f"the loss is {loss}")
    median = statistics.median(seconds[1:])
    peak = (mesh.devices.flat[0].memory_stats() or {}).get("peak_bytes_in_use")
    return {
        "compile_s": compile_seconds,
        "step_s": median,
        "patches_per_s": config.data.batch_size / median,
        "compiled_gb": programs.gigabytes(compiled),
        "peak_gb_so_far": peak and peak / 1e9,
        "loss": loss,
    }


def step_rows(*, small: bool):
    """Yield a row for each size on one device and on all."""
    counts = sorted({1, jax.device_count()})
    for side in SMALL_SIDES if small else SIDES:
        for devices in counts:
            yield step_row(side=side, devices=devices, small=small)


def step_line(row: dict) -> str:
    """Format a row of the second table."""
    text = f"{row['side']:3}^3 on {row['devices']} device(s)  "
    if row["status"] != "ok":
        return text + row["status"]
    peak = row["peak_gb_so_far"]
    return (
        f"{text}{row['step_s']:8.3f} s  {row['patches_per_s']:7.2f} patches/s  "
        f"compiled {row['compiled_gb']:6.2f} GB  "
        f"peak so far {'unknown' if peak is None else f'{peak:.2f} GB'}  "
        f"compile {row['compile_s']:.0f} s"
    )


def headline(parity_found: list[dict], steps: list[dict]) -> dict:
    """Return the figures by flat names; None of parity where nothing was compared."""
    beyond = sum(not row["ok"] for row in parity_found)
    figures = {
        "parity_figures": len(parity_found) or None,
        "parity_beyond": beyond if parity_found else None,
    }
    for row in steps:
        name = f"step_{row['side']}_{row['devices']}"
        figures[f"{name}_s"] = row.get("step_s")
        figures[f"{name}_gb"] = row.get("compiled_gb")
    return figures


def is_fine(parity_found: list[dict], steps: list[dict]) -> bool:
    """Tell whether every figure is within tolerance and no step failed."""
    status = {row["status"] for row in steps}
    return all(r["ok"] for r in parity_found) and status <= {"ok", "out of memory"}


def check_network(options) -> int:
    """Do the first part in this process; return the exit status."""
    startup.start()
    found = report({}, parity=[], steps=[])
    print("  ".join(f"{k} {v}" for k, v in found["machine"].items()), flush=True)
    small = options.quick or found["machine"]["platform"] == "cpu"
    found["small"] = small

    def save():
        found["headline"] = headline(found["parity"], found["steps"])
        write(options.json, found)

    print("the paper's step, bfloat16" if not small else "a small network's step")
    for row in step_rows(small=small):
        found["steps"].append(row)
        print(step_line(row), flush=True)
        save()
    goldens = Path(options.goldens)
    if goldens.is_dir():
        found["parity"] = parity_rows(goldens, quick=options.quick)
        names = parity.Figure._fields
        parity.print_table(
            [parity.Figure(**{n: row[n] for n in names}) for row in found["parity"]]
        )
    else:
        print(f"no parity figures: there is no folder {goldens}; see --goldens")
    save()
    return 0 if is_fine(found["parity"], found["steps"]) else 1


def command_of(part: str, options) -> list[str]:
    """Return the command line of a part, without --json."""
    if part != "network":
        name, *arguments = COMMANDS[part]
        if part == "model" and options.quick:
            arguments = ["--smallest"]
        return [sys.executable, "-m", f"benchmarks.{name}", *arguments]
    goldens = f"--goldens={Path(options.goldens).resolve()}"
    quick = ["--quick"] if options.quick else []
    return [
        sys.executable,
        "-m",
        "benchmarks.gpu_check",
        "--in_process",
        goldens,
        *quick,
    ]


def setting(*, quick: bool, goldens: str | Path) -> dict:
    """Describe what reports must share to be of one run, leaving devices alone."""
    query = ("nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader")
    return {
        "gpus_and_driver": (_output(*query) or "").splitlines(),
        "platforms": os.environ.get("JAX_PLATFORMS", ""),
        "quick": quick,
        "versions": versions(),
        "revision": _output("git", "-C", str(ROOT), "rev-parse", "HEAD"),
        "sources": digest(ROOT),
        "goldens": Path(goldens).is_dir(),
    }


def digest(root: Path) -> str:
    """Return a digest of the code, which changes that are not committed move too."""
    total = hashlib.sha256()
    for folder in SOURCES:
        for file in sorted((root / folder).rglob("*.py")):
            total.update(f"{file.relative_to(root)}\0".encode() + file.read_bytes())
    return total.hexdigest()[:16]


def _output(*command):
    """Return what a command prints, or None if it fails or is not there."""
    try:
        found = subprocess.run(command, capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return found.stdout.strip() if found.returncode == 0 else None


def run_part(command: list[str], file: Path, *, limit: float, about: dict) -> dict:
    """Run a part unless its file is there; return its report with how it ended.

    What a part has written before it fails or runs over its limit is kept, under a
    name that does not count as done; so is a file whose setting is not `about`.
    """
    known = _read(file)
    if known.get("setting") == about:
        return known | {"status": "done before"}
    unfinished = file.with_suffix(".unfinished.json")
    unfinished.unlink(missing_ok=True)
    start = time.perf_counter()
    status = _ended([*command, f"--json={unfinished}"], limit=limit)
    seconds = time.perf_counter() - start
    found = _read(unfinished) | {"setting": about, "seconds": seconds}
    if status == "ok":
        file.write_text(json.dumps(found, indent=1) + "\n")
        unfinished.unlink(missing_ok=True)
    return found | {"status": status}


def _ended(command, *, limit):
    """Run a command; end it with all that it started when its time is over."""
    process = subprocess.Popen(command, cwd=ROOT, start_new_session=True)
    try:
        ended = process.wait(timeout=limit)
        return "ok" if ended == 0 else f"failed with status {ended}"
    except subprocess.TimeoutExpired:
        return f"stopped after its limit of {limit:g} s"
    finally:
        if process.poll() is None:  # also at Ctrl-C
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def _read(file):
    """Return a report; {} for none, and one that was cut off in writing."""
    try:
        return json.loads(file.read_text())
    except (OSError, ValueError):
        return {}


def main(options):
    if options.in_process:
        return check_network(options)
    folder = Path(options.output).resolve()
    folder.mkdir(parents=True, exist_ok=True)
    parts = {}
    about = setting(quick=options.quick, goldens=options.goldens)
    for part in options.parts:
        if part == "largest_batch" and not about["gpus_and_driver"]:
            print(f"== {part}: skipped, there is no NVIDIA GPU", flush=True)
            continue
        limit = options.limit or LIMITS[part]
        print(f"== {part}, at most {limit:g} s", flush=True)
        file = folder / f"{part}.json"
        if options.redo:
            file.unlink(missing_ok=True)
        command = command_of(part, options)
        parts[part] = run_part(command, file, limit=limit, about=about)
        print(f"== {part}: {parts[part]['status']}", flush=True)
    figures = {}
    for name, part in parts.items():
        known = part.get("headline", {}).items()
        figures |= {f"{name}_{key}": value for key, value in known}
    # No device is opened here: `report` would, and take the parts' memory.
    machines = [part["machine"] for part in parts.values() if "machine" in part]
    summary = {
        "headline": figures,
        "machine": next((m for m in machines if isinstance(m, dict)), None),
        "versions": versions(),
        "setting": about,
        "command": command_line(),
        "parts": parts,
    }
    write(options.json, summary)
    fine = {"ok", "done before"}
    return 0 if all(part["status"] in fine for part in parts.values()) else 1


if __name__ == "__main__":
    flags.DEFINE_bool("in_process", False, "the first part alone, in this process")
    flags.DEFINE_bool("redo", False, "do parts again that are done")
    flags.DEFINE_list("parts", list(LIMITS), "parts to do")
    flags.register_validator(
        "parts",
        lambda parts: set(parts) <= LIMITS.keys(),
        message=f"must be some of {','.join(LIMITS)}",
    )
    flags.DEFINE_float("limit", None, "seconds for each part", lower_bound=1)
    flags.DEFINE_string("output", "runs/gpu_check", "folder of the parts' reports")
    flags.DEFINE_string("goldens", "../shared/parity", "folder of golden tensors")
    run(main, quick="a small network and crops, few goldens")
