"""Is this machine's GPU right, how fast is it, and what fits? Minutes, one command.

    python -m benchmarks.gpu_check [--quick] [--goldens=../shared/parity] [--json=FILE]

1. The network, its modules, loss and sliding window against the golden tensors of
   PyTorch (see benchmarks/parity.py), on this machine's device: float32 with the
   highest precision of matrix products, and bfloat16. An accelerator adds up in another
   order than a CPU, so it may deviate ten times as much.
2. Training steps of the paper's Swin SMT in bfloat16, a random crop on each device, at
   96^3 and 128^3, on one device and on all: time and memory. A step that needs too much
   memory is a row of the table, not the end of it.

On a CPU, and with --quick, the network and the crops of the second part are small. Ends
with status 1 if a figure is beyond its tolerance or a step fails but for memory.
"""

import json
import platform
import statistics
import sys
import time
from pathlib import Path

if __package__ in (None, ""):  # python benchmarks/gpu_check.py
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import flax
import jax
import numpy as np
from absl import app, flags

from benchmarks import parity
from configs import swin_smt_paper
from swinsmt_jax import losses, sharding
from swinsmt_jax.config import from_config_dict
from swinsmt_jax.training import startup
from swinsmt_jax.training import state as train_state
from swinsmt_jax.training.optimizer import make_optimizer, make_schedule
from swinsmt_jax.training.step import make_train_step

SIDES, SMALL_SIDES = (96, 128), (32, 64)
STEPS = 5
ON_ACCELERATOR = 10  # times the tolerance of a CPU
OUT_OF_MEMORY = ("RESOURCE_EXHAUSTED", "out of memory", "Out of memory")


def parity_rows(goldens: Path) -> list[dict]:
    """Measure the figures of `benchmarks.parity` on the default device."""
    factor = 1 if jax.default_backend() == "cpu" else ON_ACCELERATOR
    with jax.default_matmul_precision("highest"):
        figures = parity.all_figures(goldens)
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
    schedule = make_schedule(config.optimizer, num_steps=config.training.num_steps)
    optimizer = make_optimizer(config.optimizer, schedule)
    graphdef, like = train_state.blueprint(config.model, optimizer, mesh=mesh)
    step = make_train_step(
        graphdef,
        optimizer,
        schedule=schedule,
        loss_fn=losses.dice_cross_entropy,
        seed=0,
        like=like,
        mesh=mesh,
    )
    batch = sharding.place_batch(_random_batch(config), mesh)
    start = time.perf_counter()
    compiled = step.lower(like, batch).compile()
    compile_seconds = time.perf_counter() - start
    memory = compiled.memory_analysis()
    state = train_state.initialize(config.model, optimizer, seed=0, like=like)
    seconds = []
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
        "compiled_gb": memory
        and (memory.argument_size_in_bytes + memory.temp_size_in_bytes) / 1e9,
        "peak_gb_so_far": peak and peak / 1e9,
        "loss": loss,
    }


def _random_batch(config):
    rng = np.random.default_rng(0)
    shape = (config.data.batch_size, *config.data.patch_shape)
    image = rng.random((*shape, 1), np.float32)
    labels = rng.integers(0, config.model.out_channels, shape, np.uint8)
    return {"image": image, "label": labels}


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
        f"compiled {row['compiled_gb'] or float('nan'):6.2f} GB  "
        f"peak so far {'unknown' if peak is None else f'{peak:.2f} GB'}  "
        f"compile {row['compile_s']:.0f} s"
    )


def headline(parity_found: list[dict], steps: list[dict]) -> dict:
    """Return the figures by flat names, for checks."""
    figures = {
        "parity_figures": len(parity_found),
        "parity_beyond": sum(not row["ok"] for row in parity_found),
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


def machine() -> dict:
    """Describe devices and versions."""
    device = jax.devices()[0]
    return {
        "platform": device.platform,
        "device": device.device_kind,
        "devices": jax.device_count(),
        "jax": jax.__version__,
        "jaxlib": jax.lib.__version__,
        "flax": flax.__version__,
        "python": platform.python_version(),
    }


def main(_):
    options = flags.FLAGS
    startup.start()
    about = machine()
    print("  ".join(f"{name} {value}" for name, value in about.items()), flush=True)
    goldens, parity_found = Path(options.goldens), []
    if goldens.is_dir():
        parity_found = parity_rows(goldens)
        names = parity.Figure._fields
        parity.print_table(
            [parity.Figure(**{n: row[n] for n in names}) for row in parity_found]
        )
    else:
        print(f"no parity figures: there is no folder {goldens}; see --goldens")
    small = options.quick or about["platform"] == "cpu"
    print("the paper's step, bfloat16" if not small else "a small network's step")
    steps = []
    for row in step_rows(small=small):
        steps.append(row)
        print(step_line(row), flush=True)
    if options.json:
        report = {
            "machine": about,
            "command": " ".join(sys.argv),
            "headline": headline(parity_found, steps),
            "parity": parity_found,
            "steps": steps,
        }
        Path(options.json).write_text(json.dumps(report, indent=1))
    return 0 if is_fine(parity_found, steps) else 1


if __name__ == "__main__":
    flags.DEFINE_bool("quick", False, "a small network and small crops")
    flags.DEFINE_string("goldens", "../shared/parity", "folder of golden tensors")
    flags.DEFINE_string("json", None, "also write the figures to this file")
    app.run(main)
