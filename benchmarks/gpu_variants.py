"""Variants of a training step on a GPU: flags of XLA, and other forms of operations.

    python -m benchmarks.gpu_variants [--variants=NAME,...] [--quick] [--json=FILE]

The step is that of the paper's Swin SMT at 128^3 in bfloat16 on one device. Each
variant changes one thing of it and is measured in a process of its own. `base` changes
nothing and goes first in each call: every row has the ratio to the base of its own
call. Other rows that the file of --json has of the same device and packages are kept.

base: the step as it is. What its compiled program copies is printed.
command_buffers_off, ..._without_cudnn, ..._of_fusions, ..._with_loops: CUDA graphs of
    nothing, of all but cuDNN's calls, of fusions alone, of whole loops too.
conv_nhwc: 3-D convolutions with channels last, by a flag.
blocks_x4, blocks_x16: blocks of the loss and of the experts with more entries.
stacked_planes: 3 x 3 x 3 convolutions as 2-D ones (`benchmarks.stacked_planes`).
latency_hiding: the scheduler that hides latencies.
padded_head: 120 logits in place of 118, of which the last two are -1e30.

A flag that this jaxlib does not know would end the process; a short process tries it
first. A row has the seconds of compilation (of a second start, if the cache has the
program), the median step by the clock, memory as compiled, what is recomputed, the
loss of the first step and its deviation from base's, and the copies in the compiled
program. Where a profile has kernels (on a GPU) it also has their time and number, the
gap to the clock, and the copies that ran.

On a CPU, and with --quick, network and crop are small. The status is 1 if a variant
fails for another reason than memory, or its loss deviates.
"""

import contextlib
import functools
import math
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import jax.numpy as jnp
from absl import flags

from benchmarks import (
    ROOT,
    command_line,
    gpu_copies,
    gpu_parts,
    gpus,
    programs,
    read,
    report,
    roofline,
    run,
    stacked_planes,
    versions,
    write,
)
from swinsmt_jax.ops import by_platform
from swinsmt_jax.runtime import startup
from swinsmt_jax.runtime.xla_flags import VARIABLE
from swinsmt_jax.training import losses

STEPS, FEW = 10, 2  # that are timed, after two; in the small form
TOLERANCE = 1e-3  # of the first step's loss, whose network computes in bfloat16
UNKNOWN = "unknown to this jaxlib"
MULTIPLE = 8  # of the padded head's logits
TRIAL = "import jax; jax.jit(lambda x: x + 1)(1.0)"  # by then the flags are read


class Variant(NamedTuple):
    """What differs from the step as it is.

    Attributes:
        flags: of XLA.
        change: returns what makes the change while it is entered.
    """

    flags: str = ""
    change: Callable[[], AbstractContextManager] = contextlib.nullcontext


class PaddedLoss(losses.Loss):
    """A loss by softmax whose head makes a multiple of `MULTIPLE` logits."""

    def of_features(self, features, kernel, bias, labels, annotated=None):
        """Return the loss as `losses.Loss` does; further classes have no part in it."""
        classes = bias.size
        more = -classes % MULTIPLE
        kernel = jnp.pad(kernel, ((0, 0), (0, more)))
        bias = jnp.pad(bias, (0, more), constant_values=losses.NOTHING)
        padded = losses.Loss(
            lambda *sums: self.overlap(*(part[:, :classes] for part in sums))
        )
        return padded.of_features(features, kernel, bias, labels, annotated)


def padded_head() -> AbstractContextManager:
    """Return what makes the heads of softmax losses a multiple of `MULTIPLE` wide."""
    padded = {
        name: PaddedLoss(loss.overlap)
        for name, loss in losses.LOSSES.items()
        if not loss.one_vs_all
    }
    return mock.patch.dict(losses.LOSSES, padded)


def larger_blocks(times: int) -> AbstractContextManager:
    """Return what makes the blocks of loss and experts larger."""
    entries = times * by_platform.entries_at_a_time()
    return mock.patch.object(by_platform, "entries_at_a_time", lambda: entries)


def planes() -> AbstractContextManager:
    """Return what makes 3 x 3 x 3 convolutions 2-D ones, on each platform."""

    def convolve(*operands):
        *parts, kernel = operands
        return stacked_planes.conv(jnp.concatenate(parts, axis=-1), kernel)

    return mock.patch.object(by_platform, "conv3x3x3", convolve)


COMMAND_BUFFER = "--xla_gpu_enable_command_buffer="
VARIANTS = {  # in order of worth
    "base": Variant(),
    "command_buffers_off": Variant(COMMAND_BUFFER),
    "command_buffers_without_cudnn": Variant(f"{COMMAND_BUFFER}-CUDNN"),
    "conv_nhwc": Variant("--xla_gpu_force_conv_nhwc=true"),
    "blocks_x4": Variant(change=functools.partial(larger_blocks, 4)),
    "stacked_planes": Variant(change=planes),
    "latency_hiding": Variant("--xla_gpu_enable_latency_hiding_scheduler=true"),
    "padded_head": Variant(change=padded_head),
    "command_buffers_with_loops": Variant(f"{COMMAND_BUFFER}+WHILE"),
    "command_buffers_of_fusions": Variant(f"{COMMAND_BUFFER}FUSION"),
    "blocks_x16": Variant(change=functools.partial(larger_blocks, 16)),
}


def own_row(name: str, *, small: bool) -> dict:
    """Measure a variant in this process, which has its flags."""
    side = gpu_parts.SMALL_SIDES[-1] if small else gpu_parts.SIDES[0]
    row = {"variant": name, "side": side, "status": "ok"}
    try:
        with VARIANTS[name].change(), by_platform.noting() as attention:
            size = {"side": side, "devices": 1, "batch": 1}
            config = gpu_parts.experiment(**size, small=small)
            row |= _timed(config, repeats=FEW if small else STEPS)
        row["attention"] = attention
    except Exception as error:  # of XLA: what it raises differs by platform
        row["status"] = gpu_parts.status_of(error)
    return row


def _timed(config, *, repeats):
    compiled, state, batch, recomputed, seconds = gpu_parts.compiled_step(config)
    step, text = gpu_parts.stepping(compiled, state, batch), compiled.as_text()
    loss = float(step()["loss"])
    if not math.isfinite(loss):
        raise FloatingPointError(f"the loss is {loss}")
    clock = statistics.median(programs.seconds_of(step, repeats=repeats))
    figures = {
        "loss": loss,
        "recomputed": recomputed,
        "compile_s": seconds,
        "step_s": clock,
        "compiled_gb": programs.gigabytes(compiled),
        "copies_compiled": gpu_copies.copies(text),
    }
    totals = roofline.profile(step, text).totals
    if totals:
        kernels, copied = totals["kernels"], totals["copies"]
        figures |= {
            "kernels_s": kernels.seconds,
            "gap_s": clock - kernels.seconds,
            "launches": kernels.launches,
            "copies_s": copied.seconds,
            "copies": copied.launches,
        }
    return figures


def refusal(given: str) -> str | None:
    """Return the status of a variant whose flags a process does not start with."""
    command = [sys.executable, "-c", TRIAL]
    memory = {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
    tried = subprocess.run(
        command, env=with_flags(given) | memory, capture_output=True, text=True
    )
    if tried.returncode == 0:
        return None
    if "Unknown flag" in tried.stderr:
        return UNKNOWN
    return f"failed: {given} ends a process with status {tried.returncode}"


def with_flags(given: str) -> dict[str, str]:
    """Return the environment with further flags of XLA."""
    before = os.environ.get(VARIABLE, "")
    return os.environ | {VARIABLE: f"{before} {given}".strip()}


def in_a_process(name: str, *, small: bool) -> tuple[dict, dict]:
    """Measure a variant in a process; return its row, and the machine if it told it."""
    given = VARIANTS[name].flags
    refused = refusal(given) if given else None
    if refused:
        return {"variant": name, "status": refused}, {}
    command = [sys.executable, "-m", "benchmarks.gpu_variants", f"--own={name}"]
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "row.json"
        command += [f"--json={file}", *(["--quick"] if small else [])]
        ended = subprocess.run(command, cwd=ROOT, env=with_flags(given)).returncode
        found = read(file)
    failed = {"variant": name, "status": f"failed: its process ended with {ended}"}
    return found.get("row", failed), found.get("machine", {})


def compared(row: dict, base: dict) -> dict:
    """Return a row with its ratio to base, and the deviation of its loss."""
    if "step_s" not in row or "step_s" not in base:
        return row
    deviation = abs(row["loss"] / base["loss"] - 1)
    beyond = deviation > TOLERANCE and row["status"] == "ok"
    return row | {
        "base_s": base["step_s"],
        "ratio": row["step_s"] / base["step_s"],
        "loss_deviation": deviation,
        "status": f"failed: the loss deviates by {deviation:.1e}"
        if beyond
        else row["status"],
    }


def measure_rows(found: dict, names: list[str], *, small: bool, save: Callable) -> None:
    """Add the rows of variants that are missing, and save each at once.

    Base is measured again if any is missing.
    """
    done = {row["variant"] for row in found["variants"]}
    missing = [name for name in names if name not in done]
    if not missing:
        return
    base = {}
    for name in ["base", *(name for name in missing if name != "base")]:
        row, machine = in_a_process(name, small=small)
        base = row if name == "base" else base
        row = compared(row, base)
        others = [other for other in found["variants"] if other["variant"] != name]
        found["variants"] = [*others, row]
        found["machine"] = machine or found["machine"]
        save()
        print(line(row), flush=True)
        if name == "base":
            for copied in row.get("copies_compiled", []):
                print(f"    {gpu_copies.line(copied)}", flush=True)


def line(row: dict) -> str:
    """Format a row of the table."""
    text = f"{row['variant']:29} "
    if "step_s" not in row:
        return text + row["status"]
    ratio = f"x {row['ratio']:.3f}" if "ratio" in row else ""
    text += f"{row['step_s']:8.4f} s {ratio}  compiled {row['compiled_gb']:6.2f} GB  "
    text += f"compile {row['compile_s']:4.0f} s"
    if row.get("recomputed"):  # memory may make it another choice than base's
        text += f"  recomputed {', '.join(row['recomputed'])}"
    if "kernels_s" in row:
        text += (
            f"  kernels {row['kernels_s']:.4f} s, {row['launches']} launches, gap "
            f"{row['gap_s']:.4f} s, {row['copies']} copies {row['copies_s']:.4f} s"
        )
    return text if row["status"] == "ok" else f"{text}  {row['status']}"


def headline(rows: list[dict]) -> dict:
    """Return the figures of the rows by flat names."""
    names = {"step_s": "s", "ratio": "ratio", "compiled_gb": "gb", "gap_s": "gap_s"}
    names |= {name: name for name in ("kernels_s", "launches", "copies", "copies_s")}
    return {
        f"{row['variant']}_{short}": row[name]
        for row in rows
        for name, short in names.items()
        if name in row
    }


def _known(path, about):
    """Return the rows of a report to go on with: of the same setting, not failed."""
    known = read(path)
    rows = known.get("variants", []) if known.get("about") == about else []
    return [row for row in rows if not row["status"].startswith("failed")]


def main(options):
    cpu = not gpus() or os.environ.get("JAX_PLATFORMS") == "cpu"
    small = options.quick or cpu
    if options.own:
        startup.start()
        write(options.json, report({}, row=own_row(options.own, small=small)))
        return
    # No device is opened here: it would take the memory of the variants' processes.
    about = {"small": small, "gpus_and_driver": gpus(), "versions": versions()}
    rows, machine = _known(options.json, about), read(options.json).get("machine")
    found = {"headline": {}, "variants": rows, "about": about, "small": small}
    found |= {"machine": machine, "versions": versions(), "command": command_line()}

    def save():
        found["headline"] = headline(found["variants"])
        write(options.json, found)

    measure_rows(found, options.variants, small=small, save=save)
    save()
    failed = [r for r in found["variants"] if r["status"].startswith("failed")]
    return 1 if failed else 0


if __name__ == "__main__":
    flags.DEFINE_list("variants", list(VARIANTS), "that are measured beside base")
    flags.register_validator(
        "variants",
        lambda names: set(names) <= set(VARIANTS),
        message=f"must be some of {','.join(VARIANTS)}",
    )
    flags.DEFINE_enum("own", None, list(VARIANTS), "measured in this process alone")
    run(main, quick="a small network and crop")
