"""Where the gradient's operations, bytes and time are, stage by stage.

    python -m benchmarks.roofline [--side=96] [--quick] [--json=FILE]

Of Swin SMT with 4 experts, 118 classes, batch 1, float32. Operations and bytes are
counted from the program before the compiler (runtime/operations.py): two operations
for a multiplication with its addition; the least bytes are those of operands and result
of every product, each read or written once, as if everything between two products were
fused into them and nothing of a product were kept on the chip for the next. The floor
is the larger of the times that these take at the rates of this machine, which are
measured: a product of two 2048 x 2048 matrices, and a sum of two large arrays. Time is
that of the program's parts in a profile; what the compiler has merged across stages
counts for one of them. --quick takes a side of 32 and no profile.
"""

import collections
import gzip
import json
import os
import re
import tempfile
import time
from pathlib import Path

import jax
import jax.numpy as jnp
from absl import app, flags

from benchmarks import define_file, report, write
from benchmarks.model_worker import Job, network_program
from swinsmt_jax.runtime import operations

STAGES = ("patch_embed", "stage1", "stage2", "stage3", "stage4", "encoder")
STAGES += ("decoder5", "decoder4", "decoder3", "decoder2", "decoder1", "head")
OTHER = "other"


def counts(function, *arguments) -> dict[str, dict[str, int]]:
    """Return {stage: operations and bytes of its products} of a program."""
    found = {name: {"operations": 0, "bytes": 0} for name in (*STAGES, OTHER)}
    for scope, equation, times in operations.products(function, *arguments):
        row = found[stage_of(scope)]
        row["operations"] += times * operations.of_product(equation)
        arrays = [v.aval for v in (*equation.invars, *equation.outvars)]
        row["bytes"] += times * sum(a.size * a.dtype.itemsize for a in arrays)
    return found


def stage_of(scope: str) -> str:
    """Return the stage that a name of the program's parts belongs to."""
    named = re.findall("|".join(STAGES), scope)
    return named[0] if named else OTHER


def rates() -> tuple[float, float]:
    """Measure operations per second of a product, and bytes per second of a sum."""
    a = jnp.ones((2048, 2048))
    large = jnp.ones(2**26)
    product = jax.jit(lambda a, b: a @ b)
    total = jax.jit(jnp.add)
    return (
        2 * 2048**3 / _seconds(product, a, a),
        3 * large.nbytes / _seconds(total, large, large),
    )


def _seconds(function, *arguments):
    jax.block_until_ready(function(*arguments))
    found = []
    for _ in range(5):
        start = time.perf_counter()
        jax.block_until_ready(function(*arguments))
        found.append(time.perf_counter() - start)
    return min(found)


def profile(compiled, *arguments) -> tuple[dict[str, float], float]:
    """Return {stage: seconds} of one run of a compiled program, and all its seconds."""
    jax.block_until_ready(compiled(*arguments))
    scopes = {}
    for line in compiled.as_text().splitlines():
        name = re.match(r"\s*(?:ROOT )?%?([\w.\-]+) = ", line)
        scope = re.search(r'op_name="([^"]*)"', line)
        if name:
            scopes[name[1]] = scope[1] if scope else ""
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            start = time.perf_counter()
            jax.block_until_ready(compiled(*arguments))
            seconds = time.perf_counter() - start
        (file,) = Path(folder).rglob("*.trace.json.gz")
        events = json.loads(gzip.decompress(file.read_bytes()))["traceEvents"]
    found = collections.Counter()
    for event in events:
        name = event.get("name")
        # A loop's time is that of what it runs.
        if event.get("ph") == "X" and name in scopes and "while" not in name:
            found[stage_of(scopes[name])] += event["dur"] / 1e6
    return dict(found), seconds


def main(_):
    options = flags.FLAGS
    if options.threads and jax.config.jax_platforms in (None, "", "cpu"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: options.threads])
    side = 32 if options.quick else options.side
    job = Job("jax", "swin_smt_e4", side, "gradient")
    program, shapes, make = network_program(job)
    per_second, bytes_per_second = rates()
    print(
        f"products {per_second / 1e9:.0f} GFLOP/s, memory {bytes_per_second / 1e9:.1f} "
        f"GB/s; gradient of Swin SMT at {side}^3"
    )
    measured, seconds = {}, None
    if not options.quick:
        measured, seconds = profile(program.lower(*shapes).compile(), *make())
    rows = []
    for name, found in counts(program.__wrapped__, *shapes).items():
        floor = max(found["operations"] / per_second, found["bytes"] / bytes_per_second)
        row = {"stage": name, **found, "floor_s": floor}
        row["seconds"] = measured.get(name)
        rows.append(row)
        took = "" if row["seconds"] is None else f"{row['seconds']:8.2f} s"
        print(
            f"{name:12} {found['operations'] / 1e9:9.1f} GFLOP "
            f"{found['bytes'] / 1e9:7.2f} GB  floor {floor:6.2f} s {took}"
        )
    headline = {
        "operations": sum(row["operations"] for row in rows),
        "bytes": sum(row["bytes"] for row in rows),
        "floor_s": sum(row["floor_s"] for row in rows),
        "seconds": seconds,
    }
    print(json.dumps(headline, indent=1))
    found = report(
        headline,
        rows=rows,
        gflop_per_second=per_second / 1e9,
        gb_per_second=bytes_per_second / 1e9,
    )
    found["machine"]["threads"] = options.threads
    write(options.json, found)


if __name__ == "__main__":
    flags.DEFINE_integer("side", 96, "of the patch")
    flags.DEFINE_integer("threads", 2, "CPU cores; 0 for all")
    flags.DEFINE_bool("quick", False, "a side of 32, no profile")
    define_file("json", "also write the figures to this file")
    app.run(main)
