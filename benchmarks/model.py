"""Time and memory of the network and of the PyTorch network, in one run.

    python -m benchmarks.model [--quick] [--json=FILE] [--plot=FILE] [--dtype=bfloat16]
    python -m benchmarks.model --networks=swin_smt_e4 --sides=64,96 --what=gradient \
        --json=FILE --add
    python -m benchmarks.model --compile [--noremat] [--json=FILE] [--add]
    python -m benchmarks.model --roofline [--side=96] [--quick] [--json=FILE]
    python -m benchmarks.model --largest_batch [--quick] [--dtype=float32] [--json=FILE]
    python -m benchmarks.model --loss [--classes=118] [--quick] [--json=FILE]

Forward pass, loss gradient and training step of Swin SMT with 4 and 32 experts and of
Swin UNETR B, 118 classes, batch 1, against the network of MONAI and soft-moe-pytorch
(extra `reference`; without it ours alone), eager, and with `torch.compile` by
--peers=torch,torch.compile, which is the default on a GPU. Every measurement is a
process of its own, so that memory is its own; ours and theirs take turns, --rounds
times, and the table has the medians. Memory is the peak of the process on a CPU, of the
allocator on a GPU. The JSON has patches/s, TFLOP/s and, where the device's peak is
known, model FLOP utilisation of each: operations are counted in the plainest form
(runtime/operations.py), three times the forward pass' with a gradient. All parts
of a network are recomputed in the backward pass: --noremat keeps all activations. What
is known to need more memory than there is is not run, and the row says so.

On a CPU in float32 on --threads cores, on a GPU in bfloat16, PyTorch with autocast,
channels_last_3d, cudnn.benchmark, fused AdamW and, in forward passes, MONAI's fused
attention; --dtype changes that. --quick measures in one round what the headline needs,
minutes on a CPU; --smallest a 64^3 patch. --networks, --sides and --what keep a part of
the rows, and --add the rows that the file of --json has from earlier parts. --resume
goes on with a run that was stopped: what its file has is not measured again. Compiled
programs are kept in JAX_COMPILATION_CACHE_DIR, if it is set.

--compile: how long the paper's training step compiles in bfloat16, from an empty cache
and then with the compiled program at hand.

--roofline: where the gradient's operations, bytes and time are, stage by stage, of Swin
SMT with 4 experts in float32. Operations and bytes are counted from the program before
the compiler: two operations for a multiplication with its addition; the least bytes are
those of operands and result of every product, each read or written once, as if
everything between two products were fused into them and nothing of a product were kept
on the chip for the next. The floor is the larger of the times that these take at this
machine's rates, which are measured: a product of two 2048 x 2048 matrices, and a sum of
two large arrays. Time is that of the program's parts in a profile; what the compiler
has merged across stages counts for one of them. --quick: a side of 32, no profile.

--largest_batch: the most patches of 128^3 that a training step of the paper's network
takes on a GPU, ours and PyTorch's, bfloat16 unless said: the batch is doubled until
memory is out, and then what is between is halved; --quick ends before that. Ours starts
from what the compiler says.

--loss: milliseconds and XLA's temporary memory of the Dice + cross-entropy of a patch
of 64^3, forward and with the gradient, of the package's loss of logits and of two ways
to write it that leave the gradient to jax; then, of features with the head before the
loss: in blocks, as training has it, and by way of the logits. --quick: a side of 32 and
one run.
"""

import dataclasses
import functools
import json
import os
import statistics
import tempfile
from pathlib import Path

import jax
from absl import flags

from benchmarks import (
    define_file,
    largest_batch,
    loss,
    report,
    roofline,
    run,
    show,
    write,
)
from benchmarks.model_table import line, plot
from benchmarks.model_worker import CONFIGS, Job, experiment, start
from swinsmt_jax import checks
from swinsmt_jax.runtime.cost import peak_of
from swinsmt_jax.runtime.operations import forward_operations

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
ON_GPU = (
    ("swin_smt_e32", 128, "step"),
    ("swin_smt_e32", 128, "forward"),
    ("swin_smt_e32", 96, "step"),
)
QUICK_ON_GPU = 6  # timed runs, which are short beside compilation
IDENTITY = ("network", "side", "what", "dtype", "remat")  # of a row
PASSES = {"forward": 1, "gradient": 3, "step": 3}  # operations, in forward passes
SMALLEST = (("swin_smt_e4", 64, "forward"), ("swin_smt_e4", 64, "gradient"))


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
    forward = forward_operations(experiment(job).model, (job.side,) * 3)
    return job.batch * PASSES[job.what] * forward


def peak() -> float | None:
    """Return the bfloat16 operations per second of the first device, if known."""
    return peak_of(jax.devices()[0].device_kind)


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
    with tempfile.TemporaryDirectory() as cache:
        job = dataclasses.replace(job, repeats=0, cache=cache)
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
        for key in ("time_ratio", "memory_ratio"):
            if key in row:
                found[f"{name}_{key}"] = row[key]
        if "seconds" in row.get("torch.compile", {}) and "seconds" in ours:
            theirs = row["torch.compile"]["seconds"]
            found[f"{name}_time_ratio_to_compiled"] = ours["seconds"] / theirs
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


def main(options):
    # The parent's device must leave the memory to the measured processes.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    if options.roofline:
        return roofline.measure(options)
    if options.loss:
        return loss.measure(options)
    with tempfile.TemporaryDirectory() as temporary:
        cache = os.environ.get("JAX_COMPILATION_CACHE_DIR") or temporary
        if options.largest_batch:
            return largest_batch.measure(options, cache)
        return measure(options, cache)


def measure(options, cache):
    """Measure the rows that the options choose."""
    on_cpu = jax.default_backend() == "cpu"
    rows_of = ROWS if on_cpu else ON_GPU + ROWS
    if options.quick:
        rows_of = ROWS[:2] if on_cpu else ON_GPU
    if options.smallest:
        rows_of = SMALLEST
    rounds, repeats = options.rounds, options.repeats
    if options.quick or options.smallest:
        rounds, repeats = 1, 1 if on_cpu else QUICK_ON_GPU
    peers = options.peers
    if peers is None:
        peers = ["torch"] if on_cpu else ["torch", "torch.compile"]
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
        for network, side, what in chosen(rows_of, options)
    ]
    found = report({}, rows=[])
    found["machine"]["threads"] = options.threads if on_cpu else None
    print("  ".join(f"{k} {v}" for k, v in found["machine"].items()), flush=True)
    begun = options.resume and options.json and Path(options.json).is_file()
    if options.add or begun:
        again = [] if begun or options.compile else jobs
        known = earlier(options.json, found["machine"], again)
        found |= {k: known[k] for k in ("rows", "compile") if k in known}
    if options.compile:
        paper = dataclasses.replace(job, dtype="bfloat16")
        found["compile"] = compile_seconds(jobs[0] if options.smallest else paper)
        jobs = []
        _write(found, options.json)
    measure_rows(jobs, peers, rounds, found, options.json)
    show(found["headline"])
    if options.plot:
        plot(found["rows"], options.plot)


def measure_rows(jobs, peers, rounds, found, path):
    """Add what is missing to a report's rows, and write it after each measurement."""
    # What torch.compile needs long for comes last.
    eager = [name for name in peers if name != "torch.compile"]
    compiled = [name for name in peers if name == "torch.compile"]
    for names in (["jax", *eager], compiled):
        for job in jobs:
            row = _row_of(job, found)
            missing = tuple(name for name in names if name not in row)
            if not missing:
                continue
            if "jax" in missing:  # so that the compiler's memory is not counted
                start(dataclasses.replace(job, repeats=0))
            row |= compare(job, missing, rounds=rounds)
            row |= ratios(row)
            add_rates(row, job)
            if row not in found["rows"]:
                found["rows"].append(row)
            print(line(row), flush=True)
            _write(found, path)


def _row_of(job, found):
    """Return the row that a report has for a job, or a new one."""
    about = {name: getattr(job, name) for name in IDENTITY}
    rows = (row for row in found["rows"] if about.items() <= row.items())
    return next(rows, about | {"command": found["command"]})


def _write(found, path):
    found["headline"] = headline(found["rows"]) | found.get("compile", {})
    write(path, found)


if __name__ == "__main__":
    flags.DEFINE_bool("roofline", False, "operations, bytes and time by stage")
    flags.DEFINE_integer("side", 96, "of the patch of --roofline")
    flags.DEFINE_bool("loss", False, "forms of the loss")
    flags.DEFINE_integer("classes", 118, "of --loss, background included")
    flags.DEFINE_bool("largest_batch", False, "the most patches of a step on a GPU")
    flags.DEFINE_bool("smallest", False, "a 64^3 patch, once")
    flags.DEFINE_list("networks", [], f"rows of these alone: {', '.join(CONFIGS)}")
    flags.DEFINE_list("sides", [], "rows of these sides alone")
    flags.DEFINE_list("what", [], f"rows of these alone: {', '.join(PASSES)}")
    flags.DEFINE_bool("add", False, "keep the rows that the file of --json has")
    flags.DEFINE_bool("resume", False, "measure only what the file of --json lacks")
    flags.DEFINE_bool("compile", False, "seconds of the paper's step, cold and warm")
    flags.DEFINE_enum(
        "dtype", None, ("float32", "bfloat16"), "by default float32 on a CPU"
    )
    flags.DEFINE_integer("rounds", 2, "turns of each framework")
    flags.DEFINE_integer("repeats", 2, "timed runs in a turn, after one more")
    flags.DEFINE_integer("threads", 2, "CPU cores")
    flags.DEFINE_bool("remat", True, "recompute all parts in the backward pass")
    flags.DEFINE_list(
        "peers", None, "of torch and torch.compile; empty: ours alone; both on a GPU"
    )
    define_file("plot", "also draw them to this file")
    run(main, quick="what the headline needs, once")
