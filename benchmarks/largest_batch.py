"""The most patches that a training step of the paper's network takes on a GPU.

    python -m benchmarks.largest_batch [--quick] [--dtype=float32] [--json=FILE]

At 128^3, ours and PyTorch's (extra `reference`), bfloat16 unless said: the batch is
doubled until memory is out, and then what is between is halved; --quick ends before
that. Ours starts from what the compiler says. Every try is a process of its own, as in
`benchmarks.model`.
"""

import dataclasses
import functools
import json
import os
import statistics
import tempfile
from collections.abc import Callable

import jax
from absl import app, flags

from benchmarks import define_file, report, write
from benchmarks.model import memory_limit_gb, start
from benchmarks.model_worker import Job
from swinsmt_jax import checks
from swinsmt_jax.runtime import startup

MOST_PATCHES = 64


def largest_batch(
    job: Job, *, quick: bool = False, save: Callable[[dict], None] = lambda best: None
):
    """Find the largest batch that a GPU takes; return its size and the best speed.

    `save` gets what is known so far, after each measurement. `quick` takes the first
    batch that fits where the next one tried does not.
    """
    best = {"batch": 0, "patches_per_s": 0.0}
    batch, ended = fitting_batch(job) if job.framework == "jax" else 1, None
    while batch <= MOST_PATCHES and (ended is None or best["batch"] < batch < ended):
        found = start(dataclasses.replace(job, batch=batch))
        if "error" in found:
            best["ended_by"], ended = found["error"], batch
            if batch == 1:
                break
            known = best["batch"]
            batch = known + (ended - known) // 2 if known else ended // 2
        else:
            speed = batch / statistics.median(found["seconds"])
            best["batch"] = batch
            best["patches_per_s"] = max(speed, best["patches_per_s"])
            batch = 2 * batch if ended is None else batch + (ended - batch) // 2
        save(best)
        if quick and ended and best["batch"]:
            break
    return best


def fitting_batch(job: Job) -> int:
    """Return the batch that fits by what two compiled programs need."""
    one, two = (
        start(dataclasses.replace(job, batch=n, repeats=0)).get("compiled_gb")
        for n in (1, 2)
    )
    if one is None or two is None or two <= one:
        return 1
    most = 1 + (memory_limit_gb() - one) / (two - one)
    return max(1, min(int(most), MOST_PATCHES))


def headline(found: dict[str, dict]) -> dict[str, float]:
    """Return the batch of each framework, and ours / PyTorch's."""
    figures = {name: best["batch"] for name, best in found.items()}
    if figures.get("torch") and "jax" in figures:
        figures["ratio"] = figures["jax"] / figures["torch"]
    return figures


@startup.exit_on_user_error("benchmarks.largest_batch")
def main(_):
    options = flags.FLAGS
    checks.require(
        jax.default_backend() != "cpu",
        "The end of a GPU's memory is looked for, but there is no GPU.",
    )
    # This process' device must leave the memory to the measured ones.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    found = {}

    def save(name, best):
        found[name] = best
        rows = [{"framework": n, **b} for n, b in found.items()]
        write(options.json, report(headline(found), rows=rows))

    with tempfile.TemporaryDirectory() as cache:
        for name in ("torch", "jax"):
            job = Job(
                framework=name,
                network="swin_smt_e32",
                side=128,
                what="step",
                dtype=options.dtype,
                remat=True,
                cache=cache,
            )
            best = largest_batch(
                job, quick=options.quick, save=functools.partial(save, name)
            )
            print(f"{name}: {best}", flush=True)
    print(json.dumps(headline(found), indent=1))


if __name__ == "__main__":
    flags.DEFINE_bool("quick", False, "nothing between a batch and the next tried")
    flags.DEFINE_enum("dtype", "bfloat16", ("float32", "bfloat16"), "of the network")
    define_file("json", "also write the figures to this file")
    app.run(main)
