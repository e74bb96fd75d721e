"""Operations, bytes and time of the gradient by stage; see `benchmarks.model`."""

import collections
import functools
import gzip
import json
import re
import tempfile
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp

from benchmarks import programs, report, show, write
from benchmarks.model_worker import Job, experiment, keep_to_cores
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
    a, large = jnp.ones((2048, 2048)), jnp.ones(2**26)
    product = jax.jit(lambda a, b: a @ b)
    product_s = min(programs.seconds_of(product, a, a, repeats=5))
    sum_s = min(programs.seconds_of(jax.jit(jnp.add), large, large, repeats=5))
    return 2 * 2048**3 / product_s, 3 * large.nbytes / sum_s


def profile(run: Callable, text: str) -> tuple[dict[str, float], float]:
    """Return {stage: seconds} of one run of a compiled program, and all its seconds.

    Args:
        run: calls the program.
        text: of the compiled program.
    """
    jax.block_until_ready(run())
    scopes = {}
    for line in text.splitlines():
        name = re.match(r"\s*(?:ROOT )?%?([\w.\-]+) = ", line)
        scope = re.search(r'op_name="([^"]*)"', line)
        if name:
            scopes[name[1]] = scope[1] if scope else ""
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            (seconds,) = programs.seconds_of(run, repeats=1, warm=0)
        (file,) = Path(folder).rglob("*.trace.json.gz")
        events = json.loads(gzip.decompress(file.read_bytes()))["traceEvents"]
    found = collections.Counter()
    for name, duration in _operations(events):
        # A loop's time is that of what it runs.
        if name in scopes and "while" not in name:
            found[stage_of(scopes[name])] += duration
    return dict(found), seconds


def _operations(events):
    """Yield (operation of the program, seconds) of a trace.

    A CPU's events have the operations' names. A GPU's are kernels that tell theirs, and
    are taken from its streams alone, since other rows repeat them.
    """
    rows = {
        (event["pid"], event["tid"]): event["args"]["name"]
        for event in events
        if event.get("name") == "thread_name"
    }
    streams = {row for row, name in rows.items() if "Stream" in name}
    for event in events:
        of_stream = not streams or (event.get("pid"), event.get("tid")) in streams
        if event.get("ph") == "X" and of_stream:
            name = event.get("args", {}).get("hlo_op", event.get("name"))
            yield name, event["dur"] / 1e6


def measure(options) -> None:
    """Print a row for each stage, and write the report."""
    keep_to_cores(options.threads)
    side = 32 if options.quick else options.side
    model = experiment(Job("jax", "swin_smt_e4", side, "gradient")).model
    program, shapes = programs.program(model, side, what="square")
    per_second, bytes_per_second = rates()
    print(
        f"products {per_second / 1e9:.0f} GFLOP/s, memory {bytes_per_second / 1e9:.1f} "
        f"GB/s; gradient of Swin SMT at {side}^3"
    )
    measured, seconds = {}, None
    if not options.quick:
        arguments = programs.random_arguments(shapes)
        compiled = program.lower(*shapes).compile()
        run = functools.partial(compiled, *arguments)
        measured, seconds = profile(run, compiled.as_text())
    rows = []
    for name, found in counts(program.__wrapped__, *shapes).items():
        floor = max(found["operations"] / per_second, found["bytes"] / bytes_per_second)
        row = {"stage": name, **found, "floor_s": floor, "seconds": measured.get(name)}
        rows.append(row)
        took = "" if row["seconds"] is None else f"{row['seconds']:8.2f} s"
        print(
            f"{name:12} {found['operations'] / 1e9:9.1f} GFLOP "
            f"{found['bytes'] / 1e9:7.2f} GB  floor {floor:6.2f} s {took}"
        )
    headline = {
        name: sum(row[name] for row in rows)
        for name in ("operations", "bytes", "floor_s")
    }
    show(headline | {"seconds": seconds})
    found = report(
        headline | {"seconds": seconds},
        rows=rows,
        gflop_per_second=per_second / 1e9,
        gb_per_second=bytes_per_second / 1e9,
    )
    found["machine"]["threads"] = options.threads
    write(options.json, found)
