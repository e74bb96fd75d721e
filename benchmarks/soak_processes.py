"""Disturb training runs of two and four processes at random, and check what they left.

    python -m benchmarks.soak_processes --folder=FOLDER [--lives=60] [--quick]
        [--json=FILE]

The processes connect over loopback. Two and four of them first train undisturbed. Then
they restart in one workdir until the training completes, and something happens in each
life: SIGKILL to one or all, SIGTERM, SIGUSR1 or SIGINT to one or all, SIGSTOP of one
for 30 s, a process that starts late, a second run on the port, or a second run in the
workdir. If the run survives, it takes two more steps, and SIGTERM ends it.

After each life all losses must equal those of the undisturbed training. A signal that
asks to end may lose nothing; SIGKILL may lose only the steps since the last checkpoint.
Statuses must be the documented ones, and no process may outlive its limit.

The same command continues an interrupted soak: FOLDER keeps its lives.
"""

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from absl import flags

from benchmarks import ROOT, run, save, show
from benchmarks.soak import CONFIG
from swinsmt_jax.phantoms import dataset as phantom
from swinsmt_jax.runtime import files
from swinsmt_jax.runtime.gate import free_port
from swinsmt_jax.training.checkpoint_folder import steps_of
from swinsmt_jax.training.logs import read_rows

COUNTS = (2, 4)
STEPS, EVERY = 36, 6  # of a training, and between its checkpoints
LIMIT = 180  # seconds until all processes have ended
STOPPED, LATE, JOIN = 30, 15, 90  # seconds
STATUS = {"TERM": 75, "USR1": 75, "INT": 130}
EVENTS = (
    *("KILL one", "KILL all", "TERM one", "TERM all", "USR1 one", "INT one"),
    *("INT all", "STOP one", "late start", "second on the port", "second in workdir"),
)


def environment(folder: Path) -> dict[str, str]:
    """Return the environment of each process: one device of a CPU."""
    return os.environ | {
        "JAX_PLATFORMS": "cpu",
        "JAX_NUM_CPU_DEVICES": "1",
        "JAX_COMPILATION_CACHE_DIR": str(folder / "cache"),
    }


def command(folder: Path, workdir: Path) -> list[str]:
    """Return the command line of a training, but for what each process adds."""
    return [
        *(sys.executable, "train.py", f"--config={folder}/config.py"),
        *(f"--config.data.root={folder}/data", "--config.data.batch_size=4"),
        f"--config.training.num_steps={STEPS}",
        *(f"--workdir={workdir}", f"--join_timeout={JOIN}"),
    ]


class Processes:
    """The processes of one training; what they say goes to files."""

    def __init__(
        self, folder: Path, workdir: Path, count: int, port: int, flags: Sequence[str]
    ):
        self._folder, self._workdir, self._flags = folder, workdir, flags
        self.count, self.port = count, port
        self._started: dict[int, subprocess.Popen] = {}

    def start(self, index: int, *flags: str) -> None:
        """Start one of them."""
        line = [
            *(*command(self._folder, self._workdir), *self._flags, *flags),
            *(f"--num_processes={self.count}", f"--process_id={index}"),
            f"--coordinator_address=127.0.0.1:{self.port}",
        ]
        # One that ignores Ctrl-C, as jobs in the background do, hands that down.
        before = signal.signal(signal.SIGINT, signal.default_int_handler)
        try:
            with self.said(index).open("w") as said:
                self._started[index] = subprocess.Popen(
                    line,
                    **{"cwd": ROOT, "stdout": said, "stderr": said},
                    env=environment(self._folder),
                )
        finally:
            signal.signal(signal.SIGINT, before or signal.SIG_DFL)

    def said(self, index: int) -> Path:
        """Return the file of what a process says."""
        return self._folder / f"{self._workdir.name}.{self.port}.{index}.txt"

    def send(self, number: int, indices: list[int]) -> None:
        """Send a signal to those that are there."""
        for index in indices:
            self._started[index].send_signal(number)

    def ended(self) -> bool:
        """Whether one of them is there no more."""
        return any(p.poll() is not None for p in self._started.values())

    def wait(self, limit: float) -> tuple[list[int | None], float]:
        """Wait for all; return their statuses, None after the limit, and the seconds.

        Those that are still there are killed.
        """
        start = time.monotonic()
        statuses: list[int | None] = []
        for index in sorted(self._started):
            left = max(0.1, start + limit - time.monotonic())
            try:
                statuses.append(self._started[index].wait(left))
            except subprocess.TimeoutExpired:
                statuses.append(None)
        for process in self._started.values():
            process.kill()
            process.wait()
        return statuses, time.monotonic() - start


def begin(
    folder: Path,
    workdir: Path,
    count: int,
    *,
    late: int | None = None,
    port: int = 0,
    flags: Sequence[str] = (),
    of_last: Sequence[str] = (),
) -> Processes:
    """Start all processes of a training but a late one.

    Args:
        folder: with config and data.
        workdir: of the training.
        count: of the processes.
        late: is not started.
        port: at which they meet; 0 takes a free one.
        flags: more of them.
        of_last: more of the last process alone.
    """
    port = port or free_port("127.0.0.1")
    started = Processes(folder, workdir, count, port, flags)
    for index in range(count):
        if index != late:
            started.start(index, *(of_last if index == count - 1 else ()))
    return started


def losses(workdir: Path) -> dict[int, float]:
    """Return the loss of each step that is logged."""
    rows = read_rows(workdir / "metrics.jsonl")
    return {row["step"]: row["loss"] for row in rows if "loss" in row}


def make_data(folder: Path) -> None:
    """Make scans and a config, if they are not there."""
    if not (folder / "config.py").exists():
        phantom.write_dataset(
            folder / "data", train=6, val=1, test=1, spacing=12.0, seed=0
        )
        files.write_text(folder / "config.py", CONFIG)


def prepare(folder: Path) -> None:
    """Make scans, a config, and the losses of undisturbed trainings."""
    make_data(folder)
    for count in COUNTS:
        known = folder / f"whole{count}.json"
        if not known.exists():
            workdir = folder / f"whole{count}"
            files.remove(workdir) if workdir.exists() else None
            started = begin(folder, workdir, count)
            statuses, _ = started.wait(900)
            assert statuses == [0] * count, started.said(0).read_text()
            files.write_json(known, losses(workdir))


def live(folder: Path, number: int) -> dict:
    """Live one life; return what it was and what is wrong after it."""
    chance = random.Random(number)
    count, event = COUNTS[number % len(COUNTS)], chance.choice(EVENTS)
    workdir, one = folder / f"run{count}", chance.randrange(count)
    before = steps_of(workdir / "checkpoints")
    done = max(before, default=0)
    late = one if event == "late start" else None
    first = begin(folder, workdir, count, late=late)
    if event == "late start":
        time.sleep(chance.uniform(1, LATE))
        first.start(one)
    else:
        logged = len(losses(workdir))
        until = min(logged + chance.randint(0, 6), STEPS - 2) if logged < STEPS else 0
        deadline = time.monotonic() + LIMIT
        while len(losses(workdir)) < until or ("second" in event and not begun(first)):
            if first.ended() or time.monotonic() > deadline:
                break
            time.sleep(0.02)
        time.sleep(chance.uniform(0, 1))
    wrong, found = [], {}
    # before, one may end alone, and the others wait for it in vain
    ready = event == "late start" or begun(first)
    name, _, whom = event.partition(" ")
    who = list(range(count)) if whom == "all" else [one]
    if name == "second":
        found["second"] = second(folder, workdir, first, wrong, whom)
    elif name == "STOP":
        first.send(signal.SIGSTOP, who)
        time.sleep(STOPPED)
        first.send(signal.SIGCONT, who)
    elif name != "late":
        first.send(getattr(signal, f"SIG{name}"), who)
    if name in ("late", "second", "STOP"):  # it goes on, and is asked to end then
        more = min(len(losses(workdir)) + 2, STEPS)
        deadline = time.monotonic() + LIMIT
        while len(losses(workdir)) < more and not first.ended():
            if time.monotonic() > deadline:
                wrong.append(f"no two steps in {LIMIT} s")
                break
            time.sleep(0.02)
        if len(losses(workdir)) < STEPS:
            first.send(signal.SIGTERM, list(range(count)))
    statuses, seconds = first.wait(LIMIT)
    said = first.said(one).read_text()[-300:]
    wanted = {0, STATUS.get(name, STATUS["TERM"])}
    if None in statuses:
        wrong.append(f"there after {LIMIT} s: {statuses}")
    elif (
        ready
        and name not in ("KILL", "STOP")
        and not (set(statuses) <= wanted and len(set(statuses)) == 1)
    ):
        wrong.append(f"statuses {statuses}: {said}")
    known = json.loads((folder / f"whole{count}.json").read_text())
    now, steps = losses(workdir), steps_of(workdir / "checkpoints")
    unlike = [s for s, v in now.items() if not np.isclose(v, known[str(s)], 1e-4)]
    wrong += [f"losses of steps {unlike} differ"] if unlike else []
    last, logged = max(steps, default=0), max(now, default=0)
    saved = ready and set(statuses) <= wanted
    kept = logged if saved else ((logged - 1) // EVERY - 1) * EVERY
    if last < max(kept, done):
        wrong.append(f"checkpoints end at {last} after step {logged}, before {done}")
    whole = statuses == [0] * count
    if whole:
        if last != STEPS or sorted(now) != list(range(1, STEPS + 1)):
            wrong.append(f"ended with checkpoint {last} and {len(now)} rows")
        files.remove(workdir)
    found |= {"processes": count, "event": event, "begun": ready}
    found["statuses"] = statuses
    return found | {
        **{"seconds": round(seconds, 1), "lost": 0 if whole else logged - last},
        **{"ended": whole, "wrong": wrong},
    }


def begun(first: Processes) -> bool:
    """Whether all have met, and steps are about to be taken."""
    said = first.said(0).read_text() if first.said(0).exists() else ""
    return "the first one compiles" in said or "continuing after" in said


def second(folder, workdir, first, wrong, whom):
    """Start a second run beside the first; it is refused."""
    port = first.port if whom == "on the port" else 0
    other = begin(folder, folder / "other" if port else workdir, first.count, port=port)
    statuses, _ = other.wait(LIMIT)
    if set(statuses) != {2} and not first.ended():
        wrong.append(f"second run: {statuses}: {other.said(0).read_text()[-300:]}")
    return statuses


def main(options: flags.FlagValues) -> None:
    """Live so many lives, print what was wrong, and write the report."""
    folder = Path(options.folder).resolve()
    folder.mkdir(parents=True, exist_ok=True)
    prepare(folder)
    record = folder / "lives.jsonl"
    known = record.read_text().splitlines() if record.exists() else []
    lives = [json.loads(line) for line in known]
    while len(lives) < (2 if options.quick else options.lives):
        lives.append(live(folder, len(lives)))
        with record.open("a") as lines:
            lines.write(json.dumps(lives[-1]) + "\n")
        print(len(lives), json.dumps(lives[-1]), flush=True)
    headline = summary(lives)
    show(headline)
    save(headline)


def summary(lives: list[dict]) -> dict:
    """Count lives by what happened in them, and what was wrong."""
    events = Counter(one["event"] for one in lives)
    killed = [one for one in lives if one["event"].startswith("KILL")]
    asked = [o for o in lives if o["event"].split()[0] in STATUS and o["begun"]]
    stopped = [one for one in lives if one["event"].startswith("STOP")]
    return {
        "lives": len(lives),
        **{
            f"of_{count}": sum(o["processes"] == count for o in lives)
            for count in COUNTS
        },
        **{event.replace(" ", "_"): events[event] for event in EVENTS},
        "most_lost_killed": max((one["lost"] for one in killed), default=0),
        "most_lost_asked": max((one["lost"] for one in asked), default=0),
        "longest_end_s": max((o["seconds"] for o in killed + asked), default=0),
        "went_on_after_STOP": sum(set(o["statuses"]) <= {0, 75} for o in stopped),
        "before_it_began": sum(not one["begun"] for one in lives),
        "wrong": sum(bool(one["wrong"]) for one in lives),
    }


if __name__ == "__main__":
    flags.DEFINE_string("folder", None, "that keeps the soak", required=True)
    flags.DEFINE_integer("lives", 60, "of the trainings together", lower_bound=1)
    run(main, quick="two lives")
