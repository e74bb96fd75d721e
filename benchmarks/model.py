"""Time and memory of the network beside the PyTorch network's, in one run.

    python -m benchmarks.model [--quick] [--json=FILE] [--plot=FILE]

Forward pass, loss gradient and training step of Swin SMT with 4 and 32 experts and of
Swin UNETR B, 118 classes, batch 1, against the network of MONAI and soft-moe-pytorch
(extra `reference`; without it ours alone), eager, and with `torch.compile` by
--compiled. Every measurement is a process of its own, so that memory is its own; ours
and theirs take turns, --rounds times, and the table has the medians. Memory is the
peak of the process on a CPU, of the allocator on a GPU. Networks are built with the
rematerialisation of their configs: --noremat keeps all activations.

On a CPU in float32 on --threads cores. On a GPU in bfloat16, PyTorch with autocast and
channels_last_3d. --quick measures once what the headline needs, minutes on a CPU;
--smallest a 64^3 patch.
"""

import dataclasses
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import jax
from absl import app, flags

from benchmarks import command_line, define_file
from benchmarks.gpu_check import machine
from benchmarks.model_worker import Job

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
    ("swin_smt_e32", 64, "gradient"),
    ("swin_smt_e32", 96, "gradient"),
    ("swin_unetr_b", 64, "gradient"),
    ("swin_unetr_b", 96, "gradient"),
)
ON_GPU = (("swin_smt_e32", 96, "step"), ("swin_smt_e32", 128, "step"))
MOST_PATCHES = 64
SMALLEST = (("swin_smt_e4", 64, "forward"), ("swin_smt_e4", 64, "gradient"))


def start(job: Job) -> dict:
    """Measure in a process; return what it found, or {"error": the last line}."""
    command = (sys.executable, "-m", "benchmarks.model_worker")
    done = subprocess.run(
        [*command, json.dumps(dataclasses.asdict(job))],
        cwd=ROOT,
        env=os.environ | {"TF_CPP_MIN_LOG_LEVEL": "3"},
        capture_output=True,
        text=True,
    )
    if done.returncode:
        lines = done.stderr.strip().splitlines()
        return {"error": lines[-1] if lines else f"exit status {done.returncode}"}
    return json.loads(done.stdout.splitlines()[-1])


def compare(job: Job, frameworks: tuple[str, ...], *, rounds: int) -> dict:
    """Measure a job in each framework, in turns; return a row of the table."""
    found = {name: [] for name in frameworks}
    for _ in range(rounds):
        for name in frameworks:
            found[name].append(start(dataclasses.replace(job, framework=name)))
    row = {"network": job.network, "side": job.side, "what": job.what}
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


def ratios(row: dict) -> dict:
    """Return ours / eager PyTorch's time and memory, where both are known."""
    ours, theirs = row["jax"], row.get("torch", {"error": "not measured"})
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


def headline(rows: list[dict]) -> dict[str, float | None]:
    """Return the figures by which the project measures itself."""
    by_key = {(r["network"], r["side"], r["what"]): r for r in rows}
    gradient = by_key.get(("swin_smt_e4", 96, "gradient"), {})
    forward = by_key.get(("swin_smt_e4", 128, "forward"), {})
    found = {
        "fwdbwd_96_time_ratio": gradient.get("time_ratio"),
        "fwdbwd_96_memory_ratio": gradient.get("memory_ratio"),
        "fwd_128_time_ratio": forward.get("time_ratio"),
    }
    for network, side, what in ON_GPU:
        row = by_key.get((network, side, what), {})
        if "time_ratio" in row:
            found[f"{what}_{side}_{network}_speedup"] = 1 / row["time_ratio"]
    return found


def line(row: dict) -> str:
    """One line of the table."""
    cells = [f"{row['network']:13} {row['side']:4}  {row['what']:9}"]
    for name in ("jax", "torch", "torch.compile"):
        if name in row:
            cells.append(_cell(row[name]))
    if "time_ratio" in row:
        cells.append(f"x{row['time_ratio']:5.2f}  x{row['memory_ratio']:5.2f}")
    return "  ".join(cells)


def _cell(found):
    if "error" in found:
        return f"{found['error'][:20]:>20}"
    return f"{found['seconds']:9.2f} s {found['peak_gb']:6.2f} GB"


def plot(rows: list[dict], path: str) -> None:
    """Draw times and memory side by side."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = [row for row in rows if "time_ratio" in row]
    names = [f"{row['network']} {row['side']}³ {row['what']}" for row in rows]
    figure, panels = plt.subplots(
        1, 2, figsize=(11, 0.5 * len(rows) + 1.2), sharey=True
    )
    units = {"seconds": "seconds", "peak_gb": "peak memory, GB"}
    for panel, (value, unit) in zip(panels, units.items(), strict=True):
        for shift, (name, label) in enumerate(
            {"torch": "PyTorch", "jax": "ours"}.items()
        ):
            heights = [row[name][value] for row in rows]
            places = [i + 0.4 * shift - 0.2 for i in range(len(rows))]
            panel.barh(places, heights, height=0.38, label=label)
        panel.set_xlabel(unit)
    panels[0].set_yticks(range(len(rows)), names)
    panels[0].invert_yaxis()
    panels[1].legend()
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def largest_batch(job: Job) -> dict:
    """Double the batch of a GPU until memory is out; return size and speed."""
    best = {"batch": 0, "patches_per_s": 0.0}
    batch = 1
    while batch <= MOST_PATCHES:
        found = start(dataclasses.replace(job, batch=batch))
        if "error" in found:
            return best | {"ended_by": found["error"]}
        speed = batch / statistics.median(found["seconds"])
        best = {
            "batch": batch,
            "patches_per_s": max(speed, best["patches_per_s"]),
        }
        batch *= 2
    return best


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
    once = options.quick or options.smallest
    rounds, repeats = (1, 1) if once else (options.rounds, options.repeats)
    about = machine() | {"threads": options.threads if on_cpu else None}
    print("  ".join(f"{name} {value}" for name, value in about.items()), flush=True)
    report = {"headline": {}, "rows": [], "machine": about}
    report["command"] = command_line()
    with tempfile.TemporaryDirectory() as cache:
        job = Job(
            framework="jax",
            network="swin_smt_e32",
            side=128,
            what="step",
            dtype="float32" if on_cpu else "bfloat16",
            remat=options.remat,
            repeats=repeats,
            threads=options.threads if on_cpu else 0,
            cache=cache,
        )
        if not options.smallest:
            paper = dataclasses.replace(job, dtype="bfloat16", remat=True, repeats=0)
            report["compile"] = compile_seconds(paper)
        for network, side, what in rows_of:
            this = dataclasses.replace(job, network=network, side=side, what=what)
            # Compiled beforehand, so that the compiler's memory is not counted.
            start(dataclasses.replace(this, repeats=0))
            row = compare(this, ("jax", *options.peers), rounds=rounds)
            report["rows"].append(row)
            print(line(row), flush=True)
            _write(report, options.json)
        if not on_cpu and not once:
            report["largest_batch"] = {
                name: largest_batch(dataclasses.replace(job, framework=name))
                for name in ("jax", *options.peers)
            }
        _write(report, options.json)
    print(json.dumps(report["headline"] | report.get("largest_batch", {}), indent=1))
    if options.plot:
        plot(report["rows"], options.plot)


def _write(report, path):
    report["headline"] = headline(report["rows"]) | report.get("compile", {})
    if path:
        Path(path).write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    flags.DEFINE_bool("quick", False, "what the headline needs, once")
    flags.DEFINE_bool("smallest", False, "a 64^3 patch, once")
    flags.DEFINE_integer("rounds", 2, "turns of each framework")
    flags.DEFINE_integer("repeats", 2, "timed runs in a turn, after one more")
    flags.DEFINE_integer("threads", 2, "CPU cores")
    flags.DEFINE_bool("remat", True, "rematerialise as the configs say")
    flags.DEFINE_list(
        "peers", ["torch"], "of torch and torch.compile; empty: ours alone"
    )
    define_file("json", "also write the figures to this file")
    define_file("plot", "also draw them to this file")
    app.run(main)
