"""The most patches that a training step takes on a GPU; see `benchmarks.model`."""

import dataclasses
import functools
import statistics
from collections.abc import Callable

import jax

from benchmarks import memory_limit_gb, save, show
from benchmarks.model_worker import Job, start
from swinsmt_jax import checks

MOST_PATCHES = 64


def largest_batch(
    job: Job, *, quick: bool = False, keep: Callable[[dict], None] = lambda best: None
):
    """Find the largest batch that a GPU takes; return its size and the best speed.

    `keep` gets what is known so far, after each measurement. `quick` takes the first
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
        keep(best)
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


def measure(options, cache: str) -> None:
    """Search for PyTorch and for ours, and write what is known after each try."""
    checks.require(
        jax.default_backend() != "cpu",
        "The end of a GPU's memory is looked for, but there is no GPU.",
    )
    found = {}

    def keep(name, best):
        found[name] = best
        save(headline(found), rows=[{"framework": n, **b} for n, b in found.items()])

    for name in ("torch", "jax"):
        job = Job(
            framework=name,
            network="swin_smt_e32",
            side=128,
            what="step",
            dtype=options.dtype or "bfloat16",
            remat=True,
            cache=cache,
        )
        best = largest_batch(
            job, quick=options.quick, keep=functools.partial(keep, name)
        )
        print(f"{name}: {best}", flush=True)
    show(headline(found))
