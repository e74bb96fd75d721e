"""Preprocessing, prediction and evaluation on Dask, beside local processes.

    python -m benchmarks.cluster [--quick] [--json=FILE] [--cases=12] [--workers=4]

It uses phantoms and a small network with random weights. Each command runs in one
process, in --workers local processes, on a Dask scheduler with as many workers on
loopback, and on such a scheduler with half of its workers killed while they work. All
files must equal those of one process, except for times.

The table gives the time of all cases: the shortest of --repeats turns. A first turn, in
which the workers of both kinds start, load the network and compile, is not counted.
"""

import contextlib
import functools
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

from absl import flags
from flax import nnx

from benchmarks import ROOT, run, save, small_networks
from swinsmt_jax import convert, models
from swinsmt_jax.commands import evaluate
from swinsmt_jax.config import from_config_dict
from swinsmt_jax.convert import command
from swinsmt_jax.convert import files as weights_files
from swinsmt_jax.data import preprocess
from swinsmt_jax.inference import scans, segmenter
from swinsmt_jax.inference.outputs import OutputOptions
from swinsmt_jax.phantoms.dataset import write_dataset
from swinsmt_jax.runtime import startup
from swinsmt_jax.runtime import workers as local

TASKS = ("preprocess", "predict", "evaluate")
TIMES = ("seconds", "seconds_per_scan", "run", "device")
TIME_IN_TEXT = (  # of both reports: a line, the end of a case's row, and a row
    r"[\d.]+ (s a scan|cases/s|cases/minute|s\b)"
    r"|(?<=<td>)[\d.]+$(?=\n<tr><td>|\n\n?</table>)"
    r"|<tr><td>(seconds_per_scan|device)<td>.*"
)


class Cluster:
    """A scheduler and workers on loopback, in processes of their own."""

    def __init__(self, workers: int):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self.address = f"tcp://127.0.0.1:{port}"
        place = ("--host=127.0.0.1", f"--port={port}", "--no-dashboard")
        self.scheduler = self._start("scheduler", *place)
        one = "--nthreads=1 --no-nanny --no-dashboard --memory-limit=0".split()
        start = functools.partial(self._start, "worker", self.address, *one)
        self.workers = [start() for _ in range(workers)]

    def _start(self, *arguments):
        return subprocess.Popen(
            [Path(sys.executable).with_name("dask"), *arguments],
            **{"cwd": ROOT, "env": os.environ | {"PYTHONPATH": str(ROOT)}},
            **{"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL},
        )

    def __enter__(self):
        from distributed import Client

        with Client(self.address, timeout=60, set_as_default=False) as client:
            client.wait_for_workers(len(self.workers), timeout=120)
        return self

    def __exit__(self, *_):
        for process in (*self.workers, self.scheduler):
            process.kill()
            process.wait()


def make_run(root: Path, data: Path) -> Path:
    """Return the workdir of a small network with drawn weights."""
    side = (32, 32, 32)
    values = small_networks.experiment("nnunet_plain", size="tiny", patch_shape=side)
    values.data.root = str(data)
    values.inference = {"overlap": 0.0, "window_batch": 1}
    config = from_config_dict(values)
    weights = root / "weights.safetensors"
    network = models.create(config.model, rngs=nnx.Rngs(0))
    weights_files.write(weights, convert.to_torch(network))
    about = {"weights": str(weights), "workdir": str(root / "run")}
    command.from_torch(config, **about, partial=False, classes=["v2"])
    return root / "run"


def do(task: str, data: Path, workdir: Path, output: Path, *, count: int, **pool):
    """Do one of the three with the first cases."""
    names = sorted(path.name for path in data.glob("s*"))
    if task == "preprocess":
        preprocess.preprocess(data, output, exclude=names[count:], **pool)
    elif task == "predict":
        load = functools.partial(segmenter.load, workdir)
        found = {name: data / name / "ct.nii.gz" for name in names[:count]}
        options = OutputOptions(statistics=True)
        scans.segment_scans(load(), found, output, options, load=load, **pool)
    else:
        values = flags.FlagValues()
        evaluate.define_flags(values)
        given = [f"--workdir={workdir}", f"--output={output}", "--metrics=dice"]
        given += [f"--data_root={data}", f"--limit={count}", "--step=latest"]
        if pool.get("dask"):
            given.append(f"--dask={pool['dask']}")
        elif pool:
            given.append(f"--workers={pool['workers']}")
        evaluate.evaluate(_parsed(values, given))


def _parsed(values, given):
    startup.parse(["evaluate", *given], values)
    return values


def content(root: Path) -> dict[str, object]:
    """Return what the files of a folder hold, but for times."""
    found = {}
    for path in sorted(root.rglob("*")):
        name = str(path.relative_to(root))
        if path.is_dir():
            found[name] = "folder"
        elif path.name == ".lock":
            found[name] = "lock"
        elif path.suffix == ".json":
            found[name] = _timeless(json.loads(path.read_text()))
        elif path.name == "per_case.csv":
            lines = path.read_text().splitlines()
            found[name] = [line.rpartition(",")[0] for line in lines]
        elif path.suffix == ".html":
            found[name] = re.sub(TIME_IN_TEXT, "", path.read_text(), flags=re.M)
        else:
            found[name] = path.read_bytes()
    return found


def _timeless(value):
    if isinstance(value, dict):
        return {k: _timeless(v) for k, v in value.items() if k not in TIMES}
    return [_timeless(v) for v in value] if isinstance(value, list) else value


@contextlib.contextmanager
def killing(cluster: Cluster, count: int, done):
    """Kill workers one by one, as soon as `done()` cases are there."""
    killed = []

    def kill():
        while len(killed) < count and not stop.is_set():
            if done() > len(killed):
                victim = cluster.workers[len(killed)]
                victim.send_signal(signal.SIGKILL)
                killed.append(victim.wait())
            time.sleep(0.05)

    stop = threading.Event()
    thread = threading.Thread(target=kill)
    thread.start()
    try:
        yield killed
    finally:
        stop.set()
        thread.join()


@contextlib.contextmanager
def warm_processes(workers: int):
    """Have local processes stay between calls, as the workers of Dask do."""
    usual, pool = local.run_each, local.processes(workers)
    staying = functools.partial(usual, executor=lambda _: contextlib.nullcontext(pool))
    local.run_each = staying
    try:
        yield
    finally:
        local.run_each = usual
        pool.shutdown(wait=True)


def count_done(task: str, output: Path) -> int:
    """Return how many cases are whole."""
    pattern = {"preprocess": "[!.]*/case.json", "predict": "[!.]*.nii.gz"}
    return len(list(output.glob(pattern.get(task, "cases/[!.]*.json"))))


def main(options):
    startup.start()
    cases, workers = (4, 2) if options.quick else (options.cases, options.workers)
    turns = 1 if options.quick else options.repeats
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        data, output = root / "data", root / "out"
        write_dataset(data, train=0, val=0, test=cases, spacing=options.spacing, seed=0)
        workdir = make_run(root, data)
        fine = root / "fine"  # preprocessing the others would take milliseconds
        about = {"train": 0, "val": 0, "test": cases, "seed": 0}
        write_dataset(fine, **about, spacing=12 if options.quick else options.fine)
        rows = [
            measure(task, place, workdir, output, cases, workers, turns)
            for task, place in zip(TASKS, (fine, data, data), strict=True)
            if task in (TASKS[:1] if options.quick else options.tasks)
        ]
    found = {}
    for row in rows:
        for name in ("dask_to_local", "equal", "killed"):
            found[f"{row['task']}_{name}"] = row[name]
    save(found, rows=rows, cases=cases, workers=workers)


def measure(task, data, workdir, output, cases, workers, turns):
    """Return times and equality of one of the three."""

    def timed(count, **pool):
        shutil.rmtree(output, ignore_errors=True)
        start = time.perf_counter()
        do(task, data, workdir, output, count=count, **pool)
        return time.perf_counter() - start

    row: dict = {"task": task, "cases": cases, "workers": workers}
    row["one_process_s"] = timed(cases)
    wanted = content(output)
    row["local_s"], row["dask_s"], same = [], [], []
    with warm_processes(workers), Cluster(workers) as cluster:
        pools = {"local_s": {"workers": workers}, "dask_s": {"dask": cluster.address}}
        for turn in range(turns + 1):
            for name, pool in pools.items():
                seconds = timed(cases, **pool)
                same.append(content(output) == wanted)
                if turn:
                    row[name].append(seconds)
        shutil.rmtree(output, ignore_errors=True)
        about = functools.partial(count_done, task, output)
        with killing(cluster, workers // 2, about) as killed:
            do(task, data, workdir, output, count=cases, dask=cluster.address)
        same.append(content(output) == wanted)
        row["killed"] = len(killed)
    row["dask_to_local"] = min(row["dask_s"]) / min(row["local_s"])
    row["equal"] = all(same)
    for name, own in content(output).items():
        if own != wanted.get(name):
            print(f"{task}: {name} differs")
    print(
        f"{task}: {cases} cases on {workers} workers: local "
        f"{min(row['local_s']):.2f} s, Dask {min(row['dask_s']):.2f} s "
        f"({row['dask_to_local']:.2f}); {row['killed']} killed; files equal to those "
        f"of one process: {row['equal']}",
        flush=True,
    )
    return row


if __name__ == "__main__":
    flags.DEFINE_integer("cases", 12, "phantoms", lower_bound=2)
    flags.DEFINE_integer("workers", 4, "processes of each kind", lower_bound=2)
    flags.DEFINE_integer("repeats", 2, "turns of which the shortest counts")
    flags.DEFINE_float("spacing", 12.0, "side of the phantoms' voxels in mm")
    flags.DEFINE_list("tasks", list(TASKS), "which of the three")
    flags.DEFINE_float("fine", 5.0, "the same for preprocessing")
    run(main, quick="preprocess four phantoms on two workers, of which one is killed")
