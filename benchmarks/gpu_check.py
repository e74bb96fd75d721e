"""Check that this machine's GPU is right, how fast it is, and what fits, in one
command.

    python -m benchmarks.gpu_check [--minutes=7] [--json=FILE]
        [--output=runs/gpu_check] [--redo]

The most important parts come first. Each is a separate process, so only one program is
compiled at a time. A part may take what is left of --minutes. The next call continues
with the unfinished parts and finds their programs compiled.

steps: training steps of the paper's Swin SMT in bfloat16, a random crop on each device,
    at 128^3 and 96^3, on one device and on all: time, memory, how attention is
    computed. A step that needs too much memory is a row of the table.
model: against the PyTorch network, if it is installed, eager and compiled: patches/s,
    TFLOP/s, utilisation, memory (benchmarks/model.py --quick).
profile: the time of a step by stage: kernels of a profile, by the names that the
    compiled program has for them.
parity: the network, its modules, loss and sliding window against the golden tensors of
    PyTorch (benchmarks/parity.py; skipped without --goldens) on this machine's device,
    in float32 with the highest precision of matrix products and in bfloat16. An
    accelerator sums in another order than a CPU, so it may deviate ten times as much.
commands: phantoms, train.py, evaluate.py and predict.py from end to end, in seconds.
inference: a whole body with the paper's network (benchmarks/inference.py --quick).
soft_moe, input_pipeline: the benchmarks of these names, --quick.
largest_batch: the most patches of a step, ours and PyTorch's (skipped on a CPU).

A part is not repeated for the same device, code, packages, goldens and --quick.
--parts=steps,model selects parts. On a CPU, and with --quick, the networks, crops and
runs are small, and no whole networks are compared with goldens; the JSON says "small"
and shows no GPU as its setting. The status is 1 if a figure is beyond its tolerance, a
step fails for another reason than memory, or a part fails. A part that is left for the
next call is not a failure.
"""

import hashlib
import json
import os
import shutil
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
    roofline,
    run,
    versions,
    write,
)
from swinsmt_jax import sharding
from swinsmt_jax.config import from_config_dict
from swinsmt_jax.configs import swin_smt_paper
from swinsmt_jax.ops import by_platform
from swinsmt_jax.runtime import startup

SIDES, SMALL_SIDES = (128, 96), (64, 32)
STEPS = 5
ON_ACCELERATOR = 10  # times the tolerance of a CPU
LEAST = 20  # seconds; with less left, no part is begun
IN_PROCESS = ("steps", "profile", "parity", "commands")
COMMANDS = {  # of the parts that are benchmarks; the host's sums are no GPU's figure
    "model": ("model", "--quick"),
    "inference": ("inference", "--quick", "--scans="),
    "soft_moe": ("soft_moe", "--quick"),
    "input_pipeline": ("input_pipeline", "--quick"),
    "largest_batch": ("model", "--largest_batch"),
}
PARTS = ("steps", "model", "profile", "parity", "commands", "inference", "soft_moe")
PARTS += ("input_pipeline", "largest_batch")
LEFT = "left for the next call"
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
        with by_platform.noting() as attention:
            row |= _timed_step(experiment(side=side, devices=devices, small=small))
        row["attention"] = attention
    except Exception as error:  # of XLA: what it raises differs by platform
        message = str(error)
        memory = any(words in message for words in OUT_OF_MEMORY)
        row["status"] = "out of memory" if memory else f"failed: {message[:300]}"
    return row


def _compiled_step(config):
    """Return (compiled step, state, batch, seconds of compilation) of an experiment."""
    mesh = sharding.make_mesh(config.mesh)
    step, abstract_state, initialize = programs.training_step(config, mesh)
    shape = (config.data.batch_size, *config.data.patch_shape)
    batch = programs.random_batch(shape, mesh, classes=config.model.out_channels)
    start = time.perf_counter()
    compiled = step.lower(abstract_state, batch).compile()
    return compiled, initialize(), batch, time.perf_counter() - start


def _timed_step(config) -> dict:
    compiled, state, batch, compile_seconds = _compiled_step(config)
    seconds = []
    for _ in range(STEPS):
        start = time.perf_counter()
        state, metrics = compiled(state, batch)
        loss = float(metrics["loss"])
        seconds.append(time.perf_counter() - start)
    if not np.isfinite(loss):
        raise FloatingPointError(f"the loss is {loss}")
    median = statistics.median(seconds[1:])
    peak = (jax.local_devices()[0].memory_stats() or {}).get("peak_bytes_in_use")
    return {
        "compile_s": compile_seconds,
        "step_s": median,
        "patches_per_s": config.data.batch_size / median,
        "compiled_gb": programs.gigabytes(compiled),
        "peak_gb_so_far": peak and peak / 1e9,
        "loss": loss,
    }


def profile_rows(*, small: bool) -> list[dict]:
    """Return the seconds of each stage in a training step, the longest first."""
    side = (SMALL_SIDES if small else SIDES)[0]
    config = experiment(side=side, devices=1, small=small)
    compiled, state, batch, _ = _compiled_step(config)

    def step():
        nonlocal state  # which is donated
        state, metrics = compiled(state, batch)
        return metrics

    stages, seconds = roofline.profile(step, compiled.as_text())
    rows = [{"stage": name, "seconds": own} for name, own in stages.items()]
    rows.sort(key=lambda row: -row["seconds"])
    return [{"stage": "the step, by the clock", "seconds": seconds}, *rows]


def command_rows(folder: Path, *, small: bool) -> list[dict]:
    """Run the product's own commands; return how long each took and how it ended."""
    rows = []
    for line in _command_lines(folder, small=small):
        start = time.perf_counter()
        done = subprocess.run([sys.executable, *line], cwd=ROOT)
        seconds = time.perf_counter() - start
        name = next(word for word in line if word != "-m")
        rows.append({"command": name, "seconds": seconds, "status": done.returncode})
    return rows


def _command_lines(folder, *, small):
    """Yield each command when those before it have ended."""
    data, run, scans = (folder / name for name in ("phantoms", "run", "predictions"))
    for path in (data, run, scans):
        shutil.rmtree(path, ignore_errors=True)
    phantoms = "-m swinsmt_jax.phantoms --spacing=12 --cases=8 --val=1 --test=2"
    yield [*phantoms.split(), f"--root={data}"]
    few = ["--config.training.num_steps=2", "--config.optimizer.warmup_steps=1"]
    few += ["--config.model.feature_size=12"]
    train = ["train.py", "--config=configs/demo.py", f"--workdir={run}"]
    yield [*train, f"--config.data.root={data}", *(few if small else [])]
    yield ["evaluate.py", f"--workdir={run}", "--split=test"]
    scan = min(data.glob("*/ct.nii.gz"))
    yield ["predict.py", f"--workdir={run}", f"--input={scan}", f"--output={scans}"]


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


def headline(found: dict) -> dict:
    """Return the figures of a part by flat names."""
    figures = {}
    if found["parity"]:
        figures["figures"] = len(found["parity"])
        figures["beyond"] = sum(not row["ok"] for row in found["parity"])
    for row in found["steps"]:
        name = f"{row['side']}_{row['devices']}"
        figures[f"{name}_s"] = row.get("step_s")
        figures[f"{name}_gb"] = row.get("compiled_gb")
    for row in found["profile"]:
        figures[f"{row['stage']}_s"] = row["seconds"]
    for row in found["commands"]:
        figures[f"{row['command']}_s"] = row["seconds"]
    return figures


def is_fine(found: dict) -> bool:
    """Tell whether every figure is within tolerance and nothing failed."""
    steps = {row["status"] for row in found["steps"]}
    return (
        all(row["ok"] for row in found["parity"])
        and steps <= {"ok", "out of memory"}
        and not any(row["status"] for row in found["commands"])
    )


def check(part: str, options) -> int:
    """Do a part of `IN_PROCESS` in this process; return the exit status."""
    commands = []
    if part == "commands":  # before this process takes the device's memory
        small = options.quick or not _gpus()
        commands = command_rows(Path(options.output).resolve(), small=small)
    startup.start()
    found = report({}, steps=[], profile=[], parity=[], commands=commands)
    small = options.quick or found["machine"]["platform"] == "cpu"
    found["small"] = small

    def save():
        found["headline"] = headline(found)
        write(options.json, found)

    if part == "steps":
        for row in step_rows(small=small):
            found["steps"].append(row)
            print(step_line(row), flush=True)
            save()
    if part == "profile":
        found["profile"] = profile_rows(small=small)
        for row in found["profile"]:
            print(f"{row['stage']:24} {row['seconds']:9.4f} s")
    if part == "parity":
        found["parity"] = parity_rows(Path(options.goldens), quick=options.quick)
        names = parity.Figure._fields
        parity.print_table(
            [parity.Figure(**{n: row[n] for n in names}) for row in found["parity"]]
        )
    save()
    return 0 if is_fine(found) else 1


def command_of(part: str, options) -> list[str]:
    """Return the command line of a part, without --json."""
    if part not in IN_PROCESS:
        name, *arguments = COMMANDS[part]
        if part == "model" and options.quick:
            arguments = ["--smallest"]
        return [sys.executable, "-m", f"benchmarks.{name}", *arguments]
    paths = {"goldens": options.goldens, "output": options.output}
    command = [sys.executable, "-m", "benchmarks.gpu_check", f"--in_process={part}"]
    command += [f"--{name}={Path(path).resolve()}" for name, path in paths.items()]
    return command + (["--quick"] if options.quick else [])


def setting(*, quick: bool, goldens: str | Path) -> dict:
    """Describe what reports must share to be of one run, leaving devices alone."""
    return {
        "gpus_and_driver": _gpus(),
        "platforms": os.environ.get("JAX_PLATFORMS", ""),
        "quick": quick,
        "versions": versions(),
        "revision": _output("git", "-C", str(ROOT), "rev-parse", "HEAD"),
        "sources": digest(ROOT),
        "goldens": Path(goldens).is_dir(),
    }


def _gpus():
    query = ("nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader")
    return (_output(*query) or "").splitlines()


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

    What a part has written before it fails or its time is over is kept, under a
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
        return f"stopped after {limit:.0f} s, {LEFT}"
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


def _skipped(part, about):
    """Return why a part is not for this machine, or None."""
    if part == "largest_batch" and not about["gpus_and_driver"]:
        return "there is no NVIDIA GPU"
    if part == "parity" and not about["goldens"]:
        return "there are no goldens; see --goldens"
    return None


def main(options):
    if options.in_process:
        return check(options.in_process, options)
    start, folder = time.monotonic(), Path(options.output).resolve()
    folder.mkdir(parents=True, exist_ok=True)
    parts = {}
    about = setting(quick=options.quick, goldens=options.goldens)
    for part in options.parts:
        reason = _skipped(part, about)
        if reason:
            print(f"== {part}: skipped, {reason}", flush=True)
            continue
        file = folder / f"{part}.json"
        if options.redo:
            file.unlink(missing_ok=True)
        left = options.minutes * 60 - (time.monotonic() - start)
        if left < LEAST and _read(file).get("setting") != about:
            print(f"== {part}: {LEFT}", flush=True)
            parts[part] = {"status": LEFT}
            continue
        print(f"== {part}, {left:.0f} s left", flush=True)
        command = command_of(part, options)
        parts[part] = run_part(command, file, limit=max(left, LEAST), about=about)
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
    failed = [name for name, part in parts.items() if "failed" in part["status"]]
    return 1 if failed else 0


if __name__ == "__main__":
    flags.DEFINE_enum("in_process", None, IN_PROCESS, "this part, in this process")
    flags.DEFINE_bool("redo", False, "do parts again that are done")
    flags.DEFINE_list("parts", list(PARTS), "parts to do")
    flags.register_validator(
        "parts",
        lambda parts: set(parts) <= set(PARTS),
        message=f"must be some of {','.join(PARTS)}",
    )
    flags.DEFINE_float("minutes", 7.0, "that the parts may take together")
    flags.DEFINE_string("output", "runs/gpu_check", "folder of the parts' reports")
    flags.DEFINE_string("goldens", "../shared/parity", "folder of golden tensors")
    run(main, quick="small networks, crops and runs, few goldens")
