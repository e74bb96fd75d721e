"""The parts of `benchmarks.gpu_check` that measure in their own process.

    python -m benchmarks.gpu_parts --part=steps [--quick] [--json=FILE]

`steps` goes on with the rows that the file of --json has.
"""

import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
from absl import flags

from benchmarks import (
    ROOT,
    gpus,
    parity,
    programs,
    read,
    report,
    roofline,
    run,
    write,
)
from swinsmt_jax import sharding
from swinsmt_jax.config import from_config_dict
from swinsmt_jax.configs import swin_smt_paper
from swinsmt_jax.ops import by_platform
from swinsmt_jax.runtime import startup
from swinsmt_jax.training import losses, remat, setup

PARTS = ("steps", "profile", "parity", "commands")
SIDES, SMALL_SIDES = (128, 96), (64, 32)
BATCHES = (2, 4)  # patches on one device, besides one
STEPS = 5
ON_ACCELERATOR = 10  # times the tolerance of a CPU
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


def experiment(*, side: int, devices: int, batch: int, small: bool):
    """Return the paper's experiment for `batch` crops of `side` on each device."""
    values = swin_smt_paper.get_config()
    values.data.update({"patch_shape": (side,) * 3, "batch_size": batch * devices})
    values.mesh.data = devices
    if small:
        network = {"feature_size": 12, "depths": (1, 1, 1, 1), "num_experts": 4}
        values.model.update({**network, "remat": ()})
        values.model.window_size = (4, 4, 4)
    return from_config_dict(values)


def step_row(size: dict, *, small: bool) -> dict:
    """Compile and time the step of an `experiment`; `status` says how it ended."""
    row = size | {"status": "ok"}
    try:
        with by_platform.noting() as attention:
            row |= _timed_step(experiment(**size, small=small))
        row["attention"] = attention
    except Exception as error:  # of XLA: what it raises differs by platform
        row["status"] = status_of(error)
    return row


def status_of(error: Exception) -> str:
    """Return the status of a row whose program ended with an error."""
    message = str(error)
    memory = any(words in message for words in OUT_OF_MEMORY)
    return "out of memory" if memory else f"failed: {message[:300]}"


def compiled_step(config):
    """Return (step, state, batch, what is recomputed, seconds of compilation)."""
    mesh = sharding.make_mesh(config.mesh)
    abstract_state, initialize, step_of, _ = setup.make_network(
        config.model, config.optimizer, config.training, mesh=mesh
    )
    shape = (config.data.batch_size, *config.data.patch_shape)
    batch = programs.random_batch(shape, mesh, classes=config.model.out_channels)
    start = time.perf_counter()
    compiled, _, choice = remat.compile_step(
        *(step_of, abstract_state, batch),
        model=config.model,
        data=config.data,
        loss=losses.make(config.training.loss),
        accumulate=1,
        deterministic=config.training.deterministic,
        mesh=mesh,
    )
    seconds = time.perf_counter() - start
    recomputed = list(choice.parts if choice else config.model.remat)
    return compiled, initialize(None), batch, recomputed, seconds


def _timed_step(config) -> dict:
    compiled, state, batch, recomputed, compile_seconds = compiled_step(config)
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
        "recomputed": recomputed,
        "compile_s": compile_seconds,
        "step_s": median,
        "patches_per_s": config.data.batch_size / median,
        "compiled_gb": programs.gigabytes(compiled),
        "peak_gb_so_far": peak and peak / 1e9,
        "loss": loss,
    }


def stepping(compiled, state, batch):
    """Return a function that makes a step on each call, and returns its metrics."""

    def step():
        nonlocal state  # which is donated
        state, metrics = compiled(state, batch)
        return metrics

    return step


def profile_rows(*, small: bool) -> list[dict]:
    """Return seconds and launches of a training step by stage, the longest first.

    Before them comes the time by the clock, without the profiler. On a GPU there follow
    the gap between the clock and the sum of all kernels, and the profile's totals.
    """
    side = (SMALL_SIDES if small else SIDES)[0]
    config = experiment(side=side, devices=1, batch=1, small=small)
    compiled, state, batch, *_ = compiled_step(config)
    step = stepping(compiled, state, batch)
    clock = statistics.median(programs.seconds_of(step, repeats=STEPS))
    found = roofline.profile(step, compiled.as_text())
    rows = [{"stage": "clock", "seconds": clock}]
    if found.totals:
        gap = clock - found.totals["kernels"].seconds
        rows.append({"stage": "gap", "seconds": gap})
    stages = sorted(found.stages.items(), key=lambda stage: -stage[1].seconds)
    times = [*found.totals.items(), *stages]
    return rows + [{"stage": name, **own._asdict()} for name, own in times]


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


def step_rows(known: list[dict], *, small: bool):
    """Yield a row for each size on one device and on all, then for larger batches.

    Sizes that a known row is for are left out.
    """
    sides = SMALL_SIDES if small else SIDES
    sizes = [(side, n, 1) for side in sides for n in sorted({1, jax.device_count()})]
    sizes += [(sides[-1] if small else sides[0], 1, batch) for batch in BATCHES]
    for values in sizes:
        size = dict(zip(("side", "devices", "batch"), values, strict=True))
        if not any(size.items() <= row.items() for row in known):
            yield step_row(size, small=small)


def step_line(row: dict) -> str:
    """Format a row of the second table."""
    text = f"{row['side']:3}^3, {row['batch']} on each of {row['devices']} device(s)  "
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
        name += f"_batch{row['batch']}" if row["batch"] > 1 else ""
        figures[f"{name}_s"] = row.get("step_s")
        figures[f"{name}_patches_per_s"] = row.get("patches_per_s")
        figures[f"{name}_gb"] = row.get("compiled_gb")
    for row in found["profile"]:
        figures[f"{row['stage']}_s"] = row["seconds"]
        if "launches" in row:
            figures[f"{row['stage']}_launches"] = row["launches"]
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


def main(options):
    part, commands = options.part, []
    if part == "commands":  # before this process takes the device's memory
        small = options.quick or not gpus()
        commands = command_rows(Path(options.output).resolve(), small=small)
    startup.start()
    known = read(options.json).get("steps", [])
    known = [row for row in known if not row["status"].startswith("failed")]
    found = report({}, steps=known, profile=[], parity=[], commands=commands)
    small = options.quick or found["machine"]["platform"] == "cpu"
    found["small"] = small

    def save():
        found["headline"] = headline(found)
        write(options.json, found)

    if part == "steps":
        for row in step_rows(list(known), small=small):
            found["steps"].append(row)
            print(step_line(row), flush=True)
            save()
    if part == "profile":
        found["profile"] = profile_rows(small=small)
        for row in found["profile"]:
            launches = row.get("launches", "")
            print(f"{row['stage']:24} {row['seconds']:9.4f} s {launches:>6}")
    if part == "parity":
        found["parity"] = parity_rows(Path(options.goldens), quick=options.quick)
        names = parity.Figure._fields
        parity.print_table(
            [parity.Figure(**{n: row[n] for n in names}) for row in found["parity"]]
        )
    save()
    return 0 if is_fine(found) else 1


if __name__ == "__main__":
    flags.DEFINE_enum("part", None, PARTS, "that is measured", required=True)
    flags.DEFINE_string("output", "runs/gpu_check", "folder of the commands' files")
    flags.DEFINE_string("goldens", "../shared/parity", "folder of golden tensors")
    run(main, quick="small networks, crops and runs, few goldens")
