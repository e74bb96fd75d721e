"""Operations, bytes and time of the gradient by stage; see `benchmarks.model`."""

import functools
import gzip
import json
import re
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp

from benchmarks import programs, report, show, write
from benchmarks.model_worker import Job, experiment, keep_to_cores
from swinsmt_jax.runtime import operations

STAGES = ("patch_embed", "stage1", "stage2", "stage3", "stage4", "encoder")
STAGES += ("decoder5", "decoder4", "decoder3", "decoder2", "decoder1", "head")
OTHER = "other"
COPY = re.compile(
    r"memcpy\w*|(loop_|wrapped_)?copy(_start|_done|_bitcast|_fusion)*(_\d+)*", re.I
)


class Time(NamedTuple):
    """Seconds of some operations of a program, and how many of them ran."""

    seconds: float = 0.0
    launches: int = 0


class Profile(NamedTuple):
    """Where the time of one run of a program went.

    Attributes:
        stages: time by stage.
        totals: on a GPU the time of "kernels", copies among them, of "copies", and of
            the "unmatched", of which no operation of the program is known.
        seconds: by the clock, with the profiler at work.
    """

    stages: dict[str, Time]
    totals: dict[str, Time]
    seconds: float


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


def profile(run: Callable, text: str) -> Profile:
    """Profile one run of a compiled program.

    Args:
        run: calls the program.
        text: of the compiled program.
    """
    jax.block_until_ready(run())
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            (seconds,) = programs.seconds_of(run, repeats=1, warm=0)
        (file,) = Path(folder).rglob("*.trace.json.gz")
        events = json.loads(gzip.decompress(file.read_bytes()))["traceEvents"]
    return Profile(*joined(events, text), seconds)


def joined(events: list[dict], text: str) -> tuple[dict[str, Time], dict[str, Time]]:
    """Join the events of a trace with the program's operations by name.

    A CPU's events have the operations' names. A GPU's are kernels that tell theirs, or
    are named after them with _ for all but letters and digits. They are taken from its
    streams alone, since other rows repeat them.

    Returns:
        `stages` and `totals` of a `Profile`.
    """
    scopes = {}
    for line in text.splitlines():
        name = re.match(r"\s*(?:ROOT )?%?([\w.\-]+) = ", line)
        scope = re.search(r'op_name="([^"]*)"', line)
        if name:
            scopes[_plain(name[1])] = scope[1] if scope else ""
    rows = {
        (event["pid"], event["tid"]): event["args"]["name"]
        for event in events
        if event.get("name") == "thread_name"
    }
    streams = {row for row, name in rows.items() if "Stream" in name}
    stages: dict[str, Time] = {}
    totals = dict.fromkeys(("kernels", "copies", "unmatched"), Time())
    for event in events:
        of_stream = not streams or (event.get("pid"), event.get("tid")) in streams
        if event.get("ph") != "X" or not of_stream:
            continue
        own = event.get("name", "")
        names = [_plain(event.get("args", {}).get("hlo_op", own)), _plain(own)]
        name = next((name for name in names if name in scopes), None)
        _add(totals, "kernels", event)
        if any(COPY.fullmatch(name) for name in names):
            _add(totals, "copies", event)
        if name is None:
            _add(totals, "unmatched", event)
        elif streams or "while" not in name:  # a CPU's loop has the time of its parts
            _add(stages, stage_of(scopes[name]), event)
    return stages, totals if streams else {}


def _plain(name):
    """Return an operation's name as a kernel has it."""
    return re.sub(r"\W", "_", name)


def _add(times, name, event):
    seconds, launches = times.get(name, Time())
    times[name] = Time(seconds + event["dur"] / 1e6, launches + 1)


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
    measured: dict[str, Time] = {}
    seconds = None
    if not options.quick:
        arguments = programs.random_arguments(shapes)
        compiled = program.lower(*shapes).compile()
        run = functools.partial(compiled, *arguments)
        measured, _, seconds = profile(run, compiled.as_text())
    rows = []
    for name, found in counts(program.__wrapped__, *shapes).items():
        floor = max(found["operations"] / per_second, found["bytes"] / bytes_per_second)
        took = measured[name].seconds if name in measured else None
        row = {"stage": name, **found, "floor_s": floor, "seconds": took}
        rows.append(row)
        shown = "" if took is None else f"{took:8.2f} s"
        print(
            f"{name:12} {found['operations'] / 1e9:9.1f} GFLOP "
            f"{found['bytes'] / 1e9:7.2f} GB  floor {floor:6.2f} s {shown}"
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
