"""Check that this machine's GPU is right, how fast it is, and what fits, in one
command.

    python -m benchmarks.gpu_check [--minutes=7] [--json=FILE]
        [--output=runs/gpu_check] [--redo]

The most important parts come first. A part may take what is left of --minutes. The next
call continues with the unfinished parts: first those that no call has begun, then those
that were stopped. steps, model, variants and torch_compile keep the rows that they
have. All parts share the compiled programs of all calls: they are kept in the output
folder, or in JAX_COMPILATION_CACHE_DIR if it is set.

The parts are processes, one after the other. Most of their time is compilation, which
times kernels on the device to choose among them. Another part beside it would disturb
the choice and its own figures. What needs no GPU (phantoms, tracing) takes little time,
so nothing is prepared ahead.

steps: training steps of the paper's Swin SMT in bfloat16, a random crop on each device,
    at 128^3 and 96^3, on one device and on all, and batches of 2 and 4 crops on one:
    time, patches/s, memory, what is recomputed, how attention is computed. A step that
    needs too much memory is a row of the table.
model: against the PyTorch network, if it is installed: patches/s, TFLOP/s, utilisation,
    memory, nothing rematerialised (benchmarks/model.py --quick).
profile: the time of a step by the clock, and by stage: kernels of a profile, by the
    names that the compiled program has for them. On a GPU also the number and sum of
    all kernels, the gap to the clock, copies, and kernels that match no operation.
parity: the network, its modules, loss and sliding window against the golden tensors of
    PyTorch (benchmarks/parity.py; skipped without --goldens) on this machine's device,
    in float32 with the highest precision of matrix products and in bfloat16. An
    accelerator sums in another order than a CPU, so it may deviate ten times as much.
commands: phantoms, train.py, evaluate.py and predict.py from end to end, in seconds.
variants: the same step with one thing changed at a time: flags of XLA (command buffers,
    layout of convolutions, scheduler), 3-D convolutions as 2-D ones over stacked
    planes, larger blocks, the head padded to 120 classes. Time beside the unchanged
    step's, memory, loss, kernels, gaps and copies (benchmarks/gpu_variants.py).
inference: a whole body with the paper's network (benchmarks/inference.py --quick).
soft_moe, input_pipeline: the benchmarks of these names, --quick.
largest_batch: the most patches of a step, ours and PyTorch's (skipped on a CPU).
compilation: seconds of the paper's step from an empty cache, and of a second start.
torch_compile: as model, against torch.compile, which takes minutes for each program;
    what it has compiled is kept too (skipped on a CPU and without PyTorch).

A part is not repeated for the same device, code, packages, goldens and --quick.
--parts=steps,model selects parts. On a CPU, and with --quick, the networks, crops and
runs are small, and no whole networks are compared with goldens; the JSON says "small"
and shows no GPU as its setting. The status is 1 if a figure is beyond its tolerance, a
step fails for another reason than memory, or a part fails. A part that is left for the
next call is not a failure.
"""

import hashlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

if __package__ in (None, ""):  # python benchmarks/gpu_check.py
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from absl import flags

from benchmarks import (
    ROOT,
    command_line,
    gpus,
    output_of,
    read,
    run,
    versions,
    write,
)

LEAST = 20  # seconds; with less left, no part is begun
COMMANDS = {  # of the parts that are benchmarks; the host's sums are no GPU's figure
    "model": ("model", "--noremat", "--peers=torch", "--resume"),
    "variants": ("gpu_variants",),
    "inference": ("inference", "--quick", "--scans="),
    "soft_moe": ("soft_moe", "--quick"),
    "input_pipeline": ("input_pipeline", "--quick"),
    "largest_batch": ("model", "--largest_batch"),
    "compilation": ("model", "--noremat", "--compile"),
    "torch_compile": ("model", "--noremat", "--peers=torch.compile", "--resume"),
}
SIZED = ("model", "compilation", "torch_compile")  # by --quick or --smallest
PARTS = ("steps", "model", "profile", "parity", "commands", "variants", "inference")
PARTS += ("soft_moe", "input_pipeline", "largest_batch", "compilation", "torch_compile")
ON_GPU_ALONE = ("largest_batch", "torch_compile")
LEFT = "left for the next call"
SOURCES = ("swinsmt_jax", "benchmarks")


def command_of(part: str, options) -> list[str]:
    """Return the command line of a part, without --json."""
    if part in COMMANDS:
        name, *arguments = COMMANDS[part]
        if part in SIZED:
            arguments.append("--smallest" if options.quick else "--quick")
        elif part == "variants" and options.quick:
            arguments.append("--quick")
        return [sys.executable, "-m", f"benchmarks.{name}", *arguments]
    paths = {"goldens": options.goldens, "output": options.output}
    command = [sys.executable, "-m", "benchmarks.gpu_parts", f"--part={part}"]
    command += [f"--{name}={Path(path).resolve()}" for name, path in paths.items()]
    return command + (["--quick"] if options.quick else [])


def with_caches(folder: Path) -> dict[str, str]:
    """Return the environment in which all parts keep compiled programs in a folder."""
    caches = {
        "JAX_COMPILATION_CACHE_DIR": folder / "cache",
        "TORCHINDUCTOR_CACHE_DIR": folder / "torch_cache",
    }
    return {name: str(path) for name, path in caches.items()} | os.environ


def setting(*, quick: bool, goldens: str | Path) -> dict:
    """Describe what reports must share to be of one run, leaving devices alone."""
    return {
        "gpus_and_driver": gpus(),
        "platforms": os.environ.get("JAX_PLATFORMS", ""),
        "quick": quick,
        "versions": versions(),
        "revision": output_of("git", "-C", str(ROOT), "rev-parse", "HEAD"),
        "sources": digest(ROOT),
        "goldens": Path(goldens).is_dir(),
    }


def digest(root: Path) -> str:
    """Return a digest of the code, which changes that are not committed move too."""
    total = hashlib.sha256()
    for folder in SOURCES:
        for file in sorted((root / folder).rglob("*.py")):
            total.update(f"{file.relative_to(root)}\0".encode() + file.read_bytes())
    return total.hexdigest()[:16]


def run_part(
    command: list[str],
    file: Path,
    *,
    limit: float,
    about: dict,
    env: dict[str, str] | None = None,
) -> dict:
    """Run a part unless its file is there; return its report with how it ended.

    What a part has written before it fails or its time is over is kept, under a name
    that does not count as done, and the next run gets it to go on with. Files whose
    setting is not `about` count for nothing.
    """
    known = read(file)
    if known.get("setting") == about:
        return known | {"status": "done before"}
    unfinished, begun = _unfinished(file), _begun(file)
    times = times_begun(file, about)
    if not times:
        unfinished.unlink(missing_ok=True)
    write(begun, {"setting": about, "times": times + 1})
    start = time.perf_counter()
    status = _ended([*command, f"--json={unfinished}"], limit=limit, env=env)
    seconds = time.perf_counter() - start
    found = read(unfinished) | {"setting": about, "seconds": seconds}
    if status == "ok":
        write(file, found)
        unfinished.unlink(missing_ok=True)
        begun.unlink()
    return found | {"status": status}


def times_begun(file: Path, about: dict) -> int:
    """Return how often an unfinished part was begun in this setting."""
    known = read(_begun(file))
    return known["times"] if known.get("setting") == about else 0


def _begun(file):
    return file.with_suffix(".begun.json")


def _unfinished(file):
    return file.with_suffix(".unfinished.json")


def _ended(command, *, limit, env):
    """Run a command; end it with all that it started when its time is over."""
    process = subprocess.Popen(command, cwd=ROOT, env=env, start_new_session=True)
    try:
        ended = process.wait(timeout=limit)
        return "ok" if ended == 0 else f"failed with status {ended}"
    except subprocess.TimeoutExpired:
        return f"stopped after {limit:.0f} s, {LEFT}"
    finally:
        if process.poll() is None:  # also at Ctrl-C
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def _skipped(part, about):
    """Return why a part is not for this machine, or None."""
    if part in ON_GPU_ALONE and not about["gpus_and_driver"]:
        return "there is no NVIDIA GPU"
    if part == "torch_compile" and "torch" not in about["versions"]:
        return "PyTorch is not installed"
    if part == "parity" and not about["goldens"]:
        return "there are no goldens; see --goldens"
    return None


def main(options):
    start, folder = time.monotonic(), Path(options.output).resolve()
    folder.mkdir(parents=True, exist_ok=True)
    parts = {}
    about = setting(quick=options.quick, goldens=options.goldens)
    files = {part: folder / f"{part}.json" for part in options.parts}
    for part, file in sorted(
        files.items(), key=lambda named: times_begun(named[1], about)
    ):
        reason = _skipped(part, about)
        if reason:
            print(f"== {part}: skipped, {reason}", flush=True)
            continue
        if options.redo:
            file.unlink(missing_ok=True)
        left = options.minutes * 60 - (time.monotonic() - start)
        if left < LEAST and read(file).get("setting") != about:
            print(f"== {part}: {LEFT}", flush=True)
            known = read(_unfinished(file)) if times_begun(file, about) else {}
            parts[part] = known | {"status": LEFT}
            continue
        print(f"== {part}, {left:.0f} s left", flush=True)
        command = command_of(part, options)
        parts[part] = run_part(
            *(command, file),
            limit=max(left, LEAST),
            about=about,
            env=with_caches(folder),
        )
        print(f"== {part}: {parts[part]['status']}", flush=True)
    figures = {}
    for name, part in parts.items():
        known = part.get("headline", {}).items()
        figures |= {f"{name}_{key}": value for key, value in known}
    # No device is opened here: `report` would, and take the parts' memory.
    machines = [part["machine"] for part in parts.values() if "machine" in part]
    summary = {
        "headline": figures,
        "machine": next((m for m in machines if isinstance(m, dict)), None),
        "versions": versions(),
        "setting": about,
        "command": command_line(),
        "parts": parts,
    }
    write(options.json, summary)
    failed = [name for name, part in parts.items() if "failed" in part["status"]]
    return 1 if failed else 0


if __name__ == "__main__":
    flags.DEFINE_bool("redo", False, "do parts again that are done")
    flags.DEFINE_list("parts", list(PARTS), "parts to do")
    flags.register_validator(
        "parts",
        lambda parts: set(parts) <= set(PARTS),
        message=f"must be some of {','.join(PARTS)}",
    )
    flags.DEFINE_float("minutes", 7.0, "that the parts may take together")
    flags.DEFINE_string("output", "runs/gpu_check", "folder of the parts' reports")
    flags.DEFINE_string("goldens", "../shared/parity", "folder of golden tensors")
    run(main, quick="small networks, crops and runs, few goldens")
