"""How long `load` takes: its import, and the first network, each in a fresh process.

    python -m benchmarks.load_time --workdir=runs/demo
    python -m benchmarks.load_time --workdir=runs/demo --before=../old \
        --before_module=swinsmt_jax.prediction.segmenter

measures `from flax import nnx`, `from swinsmt_jax import load` and the same with the
first `load(workdir)`, in turns; CPU seconds, since other work moves them less than the
clock. --before is a checkout of an earlier commit, its `load` lies in --before_module.
The workdir must be one that both can read. --quick measures once; --json writes.
"""

import statistics
import subprocess
import sys
from pathlib import Path

from absl import flags

from benchmarks import ROOT, run, save, show

LOAD = "from {module} import load"
AFTER = "; print(time.process_time(), time.perf_counter() - start)"


def seconds(program: str, *, root: Path) -> tuple[float, float]:
    """Run a program from a checkout; return its CPU seconds and those of the clock."""
    program = f"import time; start = time.perf_counter(); {program}{AFTER}"
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=True)
    cpu, clock = done.stdout.split()[-2:]
    return float(cpu), float(clock)


def main(options: flags.FlagValues) -> None:
    """Measure in turns, print medians and write them."""
    workdir = Path(options.workdir).resolve()
    load = LOAD.format(module="swinsmt_jax")
    programs = {
        "python": ("pass", ROOT),
        "import_nnx": ("from flax import nnx", ROOT),
        "import_load": (load, ROOT),
        "first_load": (f"{load}; load({str(workdir)!r})", ROOT),
    }
    if options.before:
        load = LOAD.format(module=options.before_module)
        old = Path(options.before).resolve()
        programs["first_load_before"] = (f"{load}; load({str(workdir)!r})", old)
    found = {name: [] for name in programs}
    for _ in range(1 if options.quick else options.rounds):
        for name, (program, root) in programs.items():
            found[name].append(seconds(program, root=root))
    headline = {}
    for name, times in found.items():
        cpu, clock = (statistics.median(column) for column in zip(*times, strict=True))
        headline |= {f"{name}_cpu_s": cpu, f"{name}_s": clock}
    bare = headline["python_cpu_s"]
    headline["import_to_nnx"] = (headline["import_load_cpu_s"] - bare) / (
        headline["import_nnx_cpu_s"] - bare
    )
    if options.before:
        headline["first_load_to_before"] = (headline["first_load_cpu_s"] - bare) / (
            headline["first_load_before_cpu_s"] - bare
        )
    show(headline)
    save(headline)


if __name__ == "__main__":
    flags.DEFINE_string("workdir", None, "folder of a run", required=True)
    flags.DEFINE_string("before", None, "checkout of an earlier commit")
    flags.DEFINE_string("before_module", "swinsmt_jax", "where its `load` lies")
    flags.DEFINE_integer("rounds", 5, "turns", lower_bound=1)
    run(main, quick="measure each once")
