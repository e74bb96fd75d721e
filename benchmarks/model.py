"""Time and memory of the network beside the PyTorch network's, in one run.

    python -m benchmarks.model [--quick] [--json=FILE] [--plot=FILE] [--dtype=bfloat16]
    python -m benchmarks.model --networks=swin_smt_e4 --sides=64,96 --what=gradient \
        --json=FILE --add

Forward pass, loss gradient and training step of Swin SMT with 4 and 32 experts and of
Swin UNETR B, 118 classes, batch 1, against the network of MONAI and soft-moe-pytorch
(extra `reference`; without it ours alone), eager, and with `torch.compile` by
--peers=torch,torch.compile, which is the default on a GPU. Every measurement is a
process of its own, so that memory is its own; ours and theirs take turns, --rounds
times, and the table has the medians. Memory is the peak of the process on a CPU, of the
allocator on a GPU. The JSON has patches/s, TFLOP/s and, where the device's peak is
known, model FLOP utilisation of each: operations are counted in the plainest form
(runtime/operations.py), three times the forward pass' with a gradient. Networks are
built with the rematerialisation of their configs: --noremat keeps all activations. What
is known to need more memory than there is is not run, and the row says so.

On a CPU in float32 on --threads cores, on a GPU in bfloat16, PyTorch with autocast and
channels_last_3d; --dtype changes that. --quick measures once what the headline needs,
minutes on a CPU; --smallest a 64^3 patch. --networks, --sides and --what keep a part of
the rows, and --add the rows that the file of --json has from earlier parts.
"""

import dataclasses
import functools
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import jax
from absl import app, flags

from benchmarks import available_gb, define_file, report, write
from benchmarks.model_table import line, plot
from benchmarks.model_worker import CONFIGS, Job, model_config
from swinsmt_jax import checks
from swinsmt_jax.runtime import startup
from swinsmt_jax.runtime.cost import PEAK
from swinsmt_jax.runtime.operations import forward_operations

ROOT = Path(__file__).resolve().parents[1]
# (network, side, what); the headline's first.
ROWS = (
    ("swin_smt_e4", 96, "gradient"),
    ("swin_smt_e4", 128, "forward"),
    ("swin_smt_e4", 64, "forward"),
    ("swin_smt_e4", 64, "gradient"),
    ("swin_smt_e4", 64, "step"),
    ("swin_smt_e4", 96, "forward"),
    ("swin_smt_e4", 96, "step"),
    *(
        (network, side, what)
        for network in ("swin_smt_e32", "swin_unetr_b")
        for side in (64, 96)
        for what in ("gradient", "forward", "step")
    ),
    ("swin_smt_e4", 192, "forward"),
)
ON_GPU = (("swin_smt_e32", 96, "step"), ("swin_smt_e32", 128, "step"))
LIMIT = 1800  # seconds of one process
IDENTITY = ("network", "side", "what", "dtype", "remat")  # of a row
PASSES = {"forward": 1, "gradient": 3, "step": 3}  # operations, in forward passes
SMALLEST = (("swin_smt_e4", 64, "forward"), ("swin_smt_e4", 64, "gradient"))


def start(job: Job) -> dict:
    """Measure in a process; return what it found, or {"error": the last line}."""
    missing = shortage(job)
    if missing:
        return {"error": missing}
    command = (sys.executable, "-m", "benchmarks.model_worker")
    try:
        done = subprocess.run(
            [*command, json.dumps(dataclasses.asdict(job))],
            cwd=ROOT,
            env=os.environ | {"TF_CPP_MIN_LOG_LEVEL": "3"},
            capture_output=True,
            text=True,
            timeout=LIMIT,
        )
    except subprocess.TimeoutExpired:
        return {"error": f"stopped after {LIMIT} s"}
    if done.returncode:
        lines = done.stderr.strip().splitlines()
        return {"error": lines[-1] if lines else f"exit status {done.returncode}"}
    return json.loads(done.stdout.splitlines()[-1])


def shortage(job: Job) -> str | None:
    """Return why a job is known not to fit, or None.

    The PyTorch network makes three matrices of tokens x slots at once in its first Soft
    MoE, and dynamic slots are as many as the tokens.
    """
    if job.framework == "jax":
        return None
    config = model_config(job)
    if not config.num_experts or config.slots != "dynamic":
        return None
    tokens = (job.side // 2 ** (5 - config.num_moe_stages)) ** 3
    needed = 3 * job.batch * tokens**2 * (4 if job.dtype == "float32" else 2) / 1e9
    limit = memory_limit_gb()
    if needed <= limit:
        return None
    return f"skipped: needs more than {needed:.0f} GB, and {limit:.0f} GB are free"


def memory_limit_gb() -> float:
    """Return the memory of the accelerator, or what is free on a CPU."""
    device = jax.devices()[0]
    if device.platform == "cpu":
        return available_gb()
    return (device.memory_stats() or {}).get("bytes_limit", float("inf")) / 1e9


def compare(job: Job, frameworks: tuple[str, ...], *, rounds: int) -> dict:
    """Measure a job in each framework, in turns; return a row of the table."""
    found = {name: [] for name in frameworks}
    for _ in range(rounds):
        for name in frameworks:
            found[name].append(start(dataclasses.replace(job, framework=name)))
    row = {name: getattr(job, name) for name in IDENTITY}
    for name, runs in found.items():
        errors = [run["error"] for run in runs if "error" in run]
        if errors:
            row[name] = {"error": errors[0]}
            continue
        seconds = [s for run in runs for s in run["seconds"]]
        row[name] = {
            "seconds": statistics.median(seconds),
            "peak_gb": statistics.median(run["peak_gb"] for run in runs),
            "all_seconds": seconds,
        }
        if name == "jax":
            known = ("compile_s", "compiled_gb")
            row[name] |= {key: runs[0][key] for key in known}
    return row | ratios(row)


@functools.cache
def operations(job: Job) -> int:
    """Count a job's operations; those of a batch, without what is done twice."""
    forward = forward_operations(model_config(job), (job.side,) * 3)
    return job.batch * PASSES[job.what] * forward


def peak() -> float | None:
    """Return the bfloat16 operations per second of the first device, if known."""
    kind = jax.devices()[0].device_kind
    return next((PEAK[name] for name in PEAK if kind.startswith(name)), None)


def add_rates(row: dict, job: Job) -> None:
    """Add patches/s, TFLOP/s and utilisation to each framework that ran."""
    for found in row.values():
        if not isinstance(found, dict) or "seconds" not in found:
            continue
        rate = operations(job) / found["seconds"]
        found["patches_per_s"] = job.batch / found["seconds"]
        found["tflop_per_s"] = rate / 1e12
        found["utilisation"] = rate / peak() if peak() else None


def ratios(row: dict) -> dict:
    """Return ours / eager PyTorch's time and memory, where both are known."""
    unknown = {"error": "not measured"}
    ours, theirs = row.get("jax", unknown), row.get("torch", unknown)
    if "error" in ours or "error" in theirs:
        return {}
    return {
        "time_ratio": ours["seconds"] / theirs["seconds"],
        "memory_ratio": ours["peak_gb"] / theirs["peak_gb"],
    }


def compile_seconds(job: Job) -> dict[str, float | None]:
    """Compile the paper's training step without and with compiled programs at hand."""
    cold, warm = start(job), start(job)
    return {
        "compile_cold_s": cold.get("compile_s"),
        "compile_warm_s": warm.get("compile_s"),
    }


def default_dtype() -> str:
    """Return the dtype in which this device is measured if none is asked for."""
    return "float32" if jax.default_backend() == "cpu" else "bfloat16"


def headline(rows: list[dict]) -> dict[str, float | None]:
    """Return the figures by which the project measures itself.

    Of rows that differ in dtype or rematerialisation alone, those of the device's
    default dtype and of the config's rematerialisation count.
    """

    def usual(row):
        return row.get("dtype") == default_dtype(), row.get("remat", True)

    by_key = {(r["network"], r["side"], r["what"]): r for r in sorted(rows, key=usual)}
    gradient = by_key.get(("swin_smt_e4", 96, "gradient"), {})
    forward = by_key.get(("swin_smt_e4", 128, "forward"), {})
    found = {
        "fwdbwd_96_time_ratio": gradient.get("time_ratio"),
        "fwdbwd_96_memory_ratio": gradient.get("memory_ratio"),
        "fwd_128_time_ratio": forward.get("time_ratio"),
    }
    for network, side, what in ON_GPU:
        row = by_key.get((network, side, what), {})
        name, ours = f"{what}_{side}_{network}", row.get("jax", {})
        if "time_ratio" in row:
            found[f"{name}_speedup"] = 1 / row["time_ratio"]
        if "seconds" in row.get("torch.compile", {}) and "seconds" in ours:
            theirs = row["torch.compile"]["seconds"]
            found[f"{name}_speedup_over_compiled"] = theirs / ours["seconds"]
        if "patches_per_s" in ours:
            for key in ("patches_per_s", "tflop_per_s", "utilisation"):
                found[f"{name}_{key}"] = ours[key]
    return found


def chosen(rows, options):
    """Keep the rows that the filters let through."""
    kept = {"networks": options.networks, "sides": options.sides, "what": options.what}
    found = [
        row
        for row in rows
        if all(not kept[k] or str(v) in kept[k] for k, v in zip(kept, row, strict=True))
    ]
    checks.require(
        bool(found),
        f"no row has --networks={','.join(options.networks)} --sides="
        f"{','.join(options.sides)} --what={','.join(options.what)}; there are "
        + ", ".join(" ".join(map(str, row)) for row in rows),
    )
    return found


def earlier(path: str | None, about: dict, jobs: list[Job]) -> dict:
    """Return the report in a file without the rows that are measured again.

    Raises:
        UserError: if there is none, or it is of another machine or version.
    """
    checks.require(
        bool(path) and Path(path).is_file(),
        f"--add keeps what the file of --json has, but --json is {path}; leave --add "
        "out for the first part.",
    )
    found = json.loads(Path(path).read_text())
    for name in ("processor", "device", "threads"):
        checks.require(
            found.get("machine", {}).get(name) == about[name],
            f"{path} was measured with {name} {found.get('machine', {}).get(name)!r}, "
            f"but this is {about[name]!r}; write to another file.",
        )
    again = {tuple(getattr(job, name) for name in IDENTITY) for job in jobs}
    found["rows"] = [
        row
        for row in found["rows"]
        if tuple(row.get(name) for name in IDENTITY) not in again
    ]
    return found


@startup.exit_on_user_error("benchmarks.model")
def main(_):
    # The parent's device must leave the memory to the measured processes.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    options = flags.FLAGS
    on_cpu = jax.default_backend() == "cpu"
    rows_of = ROWS if on_cpu else ON_GPU + ROWS
    if options.quick:
        rows_of = ROWS[:2] if on_cpu else ON_GPU
    if options.smallest:
        rows_of = SMALLEST
    rows_of = chosen(rows_of, options)
    once = options.quick or options.smallest
    rounds, repeats = (1, 1) if once else (options.rounds, options.repeats)
    peers = options.peers
    if peers is None:
        peers = ["torch"] if on_cpu else ["torch", "torch.compile"]
    found = report({}, rows=[])
    found["machine"]["threads"] = options.threads if on_cpu else None
    print("  ".join(f"{k} {v}" for k, v in found["machine"].items()), flush=True)
    with tempfile.TemporaryDirectory() as cache:
        job = Job(
            framework="jax",
            network="swin_smt_e32",
            side=128,
            what="step",
            dtype=options.dtype or default_dtype(),
            remat=options.remat,
            repeats=repeats,
            threads=options.threads if on_cpu else 0,
            cache=cache,
        )
        jobs = [
            dataclasses.replace(job, network=network, side=side, what=what)
            for network, side, what in rows_of
        ]
        if options.add:
            known = earlier(options.json, found["machine"], jobs)
            found |= {k: known[k] for k in ("rows", "compile") if k in known}
        if not options.smallest and "compile" not in found:
            paper = dataclasses.replace(job, dtype="bfloat16", remat=True, repeats=0)
            found["compile"] = compile_seconds(paper)
            _write(found, options.json)
        measure_rows(jobs, peers, rounds, found, options.json)
    print(json.dumps(found["headline"], indent=1))
    if options.plot:
        plot(found["rows"], options.plot)


def measure_rows(jobs, peers, rounds, found, path):
    """Add rows to a report, and write it after each."""
    # What torch.compile needs long for comes last.
    eager = [name for name in peers if name != "torch.compile"]
    measured = []
    for job in jobs:
        # Compiled beforehand, so that the compiler's memory is not counted.
        start(dataclasses.replace(job, repeats=0))
        row = compare(job, ("jax", *eager), rounds=rounds)
        row["command"] = found["command"]
        add_rates(row, job)
        measured.append(row)
        found["rows"].append(row)
        print(line(row), flush=True)
        _write(found, path)
    for job, row in zip(jobs, measured, strict=True):
        if "torch.compile" in peers:
            more = compare(job, ("torch.compile",), rounds=rounds)
            row["torch.compile"] = more["torch.compile"]
            add_rates(row, job)
            print(line(row), flush=True)
            _write(found, path)


def _write(found, path):
    found["headline"] = headline(found["rows"]) | found.get("compile", {})
    write(path, found)


if __name__ == "__main__":
    flags.DEFINE_bool("quick", False, "what the headline needs, once")
    flags.DEFINE_bool("smallest", False, "a 64^3 patch, once")
    flags.DEFINE_list("networks", [], f"rows of these alone: {', '.join(CONFIGS)}")
    flags.DEFINE_list("sides", [], "rows of these sides alone")
    flags.DEFINE_list("what", [], f"rows of these alone: {', '.join(PASSES)}")
    flags.DEFINE_bool("add", False, "keep the rows that the file of --json has")
    flags.DEFINE_enum(
        "dtype", None, ("float32", "bfloat16"), "by default float32 on a CPU"
    )
    flags.DEFINE_integer("rounds", 2, "turns of each framework")
    flags.DEFINE_integer("repeats", 2, "timed runs in a turn, after one more")
    flags.DEFINE_integer("threads", 2, "CPU cores")
    flags.DEFINE_bool("remat", True, "rematerialise as the configs say")
    flags.DEFINE_list(
        "peers", None, "of torch and torch.compile; empty: ours alone; both on a GPU"
    )
    define_file("json", "also write the figures to this file")
    define_file("plot", "also draw them to this file")
    app.run(main)
