"""What remat="auto" chooses, and whether its prediction of memory holds.

    python -m benchmarks.remat [--sides=64,96,128] [--limits=6,12] [--json=FILE]

For the training step of the paper's Swin SMT, one patch of each side, on a device of so
many GB: what is recomputed, the memory that was predicted, that of the compiled program
by the compiler, and the most that a step took, by the allocator of a GPU or, on a CPU,
by how the process grew. Each row has a process of its own. Float32 on a CPU, else
bfloat16. A step that needs more than this machine has is compiled and not run. --quick
takes a small network and one side.
"""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from unittest import mock

import jax
from absl import flags

from benchmarks import (
    ROOT,
    gpu_parts,
    markdown_table,
    memory_limit_gb,
    process_bytes,
    programs,
    run,
    save,
)
from swinsmt_jax import sharding
from swinsmt_jax.models.registry import AUTO
from swinsmt_jax.runtime import cost, startup
from swinsmt_jax.training import losses, remat, setup

RESERVE_GB = 3  # for Python, its libraries and what the compiler leaves
HEADER = (
    "side",
    "device, GB",
    "recomputed",
    "predicted, GB",
    "compiled, GB",
    "measured, GB",
)


def experiment(side: int, *, small: bool):
    """Return the paper's experiment with remat="auto" and one patch of a side."""
    config = gpu_parts.experiment(side=side, devices=1, batch=1, small=small)
    dtype = "float32" if jax.default_backend() == "cpu" else config.model.dtype
    model = replace(config.model, dtype=dtype, remat=AUTO)
    return replace(config, model=model)


def measure(side: int, limit_gb: float, *, small: bool) -> dict:
    """Choose, compile and, where this machine can, make a step in this process."""
    config = experiment(side, small=small)
    mesh = sharding.make_mesh(config.mesh)
    state, initialize, step_of, _ = setup.make_network(
        config.model, config.optimizer, config.training, mesh=mesh
    )
    classes = config.model.out_channels
    batch = programs.random_batch((1, *config.data.patch_shape), mesh, classes=classes)
    with mock.patch.object(cost, "device_memory", lambda mesh: int(1e9 * limit_gb)):
        compiled, _, choice = remat.compile_step(
            *(step_of, state, batch),
            model=config.model,
            data=config.data,
            loss=losses.make(config.training.loss),
            accumulate=1,
            deterministic=False,
            mesh=mesh,
        )
    row = {"side": side, "limit_gb": limit_gb, "recomputed": list(choice.parts)}
    row |= {
        "predicted_gb": choice.predicted / 1e9,
        "compiled_gb": choice.compiled / 1e9,
    }
    row["peak_gb"] = None
    if RESERVE_GB + row["compiled_gb"] < memory_limit_gb():
        on_cpu = jax.default_backend() == "cpu"
        before = process_bytes("VmRSS") if on_cpu else 0
        if on_cpu:
            Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
        jax.block_until_ready(compiled(initialize(None), batch))
        peak = process_bytes("VmHWM") if on_cpu else _of_allocator()
        row["peak_gb"] = (peak - before) / 1e9
    return row


def _of_allocator():
    return jax.local_devices()[0].memory_stats()["peak_bytes_in_use"]


def line(row: dict) -> list[str]:
    """Format a row of the table."""
    peak = row["peak_gb"]
    return [
        f"{row['side']}^3",
        f"{row['limit_gb']:g}",
        ", ".join(row["recomputed"]) or "nothing",
        f"{row['predicted_gb']:.2f}",
        f"{row['compiled_gb']:.2f}",
        "not run" if peak is None else f"{peak:.2f}",
    ]


def headline(rows: list[dict]) -> dict[str, float]:
    """Return the extremes of predicted by compiled memory."""
    ratios = [row["predicted_gb"] / row["compiled_gb"] for row in rows]
    return {"least_ratio": min(ratios), "most_ratio": max(ratios)}


def main(options):
    if options.one:
        startup.start()
        side, limit = json.loads(options.one)
        print(json.dumps(measure(side, limit, small=options.quick)))
        return
    sides = [32] if options.quick else list(map(int, options.sides))
    rows = []
    for side in sides:
        for limit in map(float, options.limits):
            command = [sys.executable, "-m", "benchmarks.remat"]
            command += [f"--one={json.dumps([side, limit])}"]
            command += ["--quick"] * options.quick
            done = subprocess.run(
                command, cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True
            )
            rows.append(json.loads(done.stdout.splitlines()[-1]))
            print(*line(rows[-1]), sep="  ", flush=True)
            save(headline(rows), rows=rows)
    print(markdown_table(HEADER, [line(row) for row in rows]))


if __name__ == "__main__":
    flags.DEFINE_list("sides", ["64", "96", "128"], "of the patch")
    flags.DEFINE_list("limits", ["6", "12"], "GB of the device")
    flags.DEFINE_string("one", "", "side and limit that this process measures, JSON")
    run(main, quick="a small network, one side")
