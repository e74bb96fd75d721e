"""Kill every command repeatedly at random moments, and check what it left.

    python -m benchmarks.soak --folder=FOLDER [--minutes=60] [--quick] [--json=FILE]

Each command first runs undisturbed. Then it is restarted on one output until it
completes. A signal ends most of its lives: SIGKILL in three of four, else SIGTERM or
SIGINT. After each life the output is compared with that of the undisturbed command.
Existing results must be equal bit for bit, results of earlier lives must still exist,
inputs must be unchanged, and no process may be left. When a command completes, all
results must exist and none may be partial. If SIGKILL hits while a scan is segmented,
the next life skips that scan once and logs it.

The same command continues an interrupted soak: FOLDER keeps its rounds.
"""

import csv
import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import nibabel as nib
import numpy as np
from absl import flags

from benchmarks import ROOT, run, save, show
from swinsmt_jax.runtime import files
from swinsmt_jax.training.logs import read_rows

CONFIG = """
from configs import demo


def get_config():
    config = demo.get_config()
    config.model = {"name": "nnunet_plain", "in_channels": 1, "out_channels": 118,
                    "features_per_stage": (4, 8), "strides": (1, 2),
                    "n_conv_per_stage": (1, 1), "n_conv_per_stage_decoder": (1,)}
    config.data.update({"patch_shape": (32, 32, 32)})
    config.optimizer.update({"warmup_steps": 1})
    config.training.update({"num_steps": 60, "eval_every": 30, "eval_cases": 1})
    config.training.update({"log_every": 1, "checkpoint_every": 6})
    config.inference.update({"overlap": 0.0})
    return config
"""
SIGNALS = (*(signal.SIGKILL,) * 6, signal.SIGTERM, signal.SIGINT)
ENDED = {signal.SIGTERM: (75,), signal.SIGINT: (130,)}  # or by the signal itself
LONGEST = 300  # seconds of a life
PATIENCE = 20  # seconds for its processes to end
Found = Mapping[str, str]  # what counts in an output, by name: its digest


def of_training(output: Path) -> Found:
    """Return digests of each checkpoint's parameters, and of each step's metrics."""
    import jax
    from flax import nnx

    from swinsmt_jax.training.checkpoint import load_model

    found = {}
    for folder in (output / "checkpoints").glob("[0-9]*"):
        if folder.name.isdecimal():
            _, model, info = load_model(output, step=folder.name)
            leaves = jax.tree.leaves(nnx.state(model))
            found[f"checkpoint {info['step']}"] = digest(map(np.asarray, leaves))
    for row in read_rows(output / "metrics.jsonl"):
        values = [row[name] for name in ("loss", "grad_norm", "learning_rate")]
        found[f"metrics {row['step']}"] = digest(map(np.float64, values))
    return found


def of_store(output: Path) -> Found:
    """Return a digest of the files of each case."""
    return {
        folder.name: digest(
            part
            for file in sorted(folder.rglob("*"))
            if file.is_file()
            for part in (str(file.relative_to(folder)).encode(), file.read_bytes())
        )
        for folder in output.glob("[!.]*/")
    }


def of_predictions(output: Path) -> Found:
    """Return digests of the voxels of all labels, and of the tables."""
    labels = {
        file.name: digest([np.asanyarray(nib.load(file).dataobj)])
        for file in output.glob("[!.]*.nii.gz")
    }
    tables = {f.name: digest([f.read_bytes()]) for f in output.glob("[!.]*.csv")}
    summary = output / "summary.json"
    record = json.loads(summary.read_text()) if summary.exists() else {}
    told = {
        f"summary {name}": digest([repr(entry["structures"]).encode()])
        for name, entry in record.items()
        if "structures" in entry
    }
    return labels | tables | told


def of_evaluation(output: Path) -> Found:
    """Return digests of the scores, without times."""
    found = {}
    for file in output.glob("[!.]*.csv"):
        with file.open(newline="") as table:
            rows = list(csv.reader(table))
        timed = rows[0][-1] == "seconds"
        found[file.name] = digest(
            [repr([r[:-1] if timed else r for r in rows]).encode()]
        )
    results = output / "results.json"
    if results.exists():
        cases = json.loads(results.read_text())["cases"]
        for name, case in cases.items():
            del case["seconds"]
            found[f"results {name}"] = digest([json.dumps(case).encode()])
    return found


def digest(parts) -> str:
    """Return a hash of arrays and bytes."""
    found = hashlib.sha256()
    for part in parts:
        found.update(part if isinstance(part, bytes) else np.ascontiguousarray(part))
    return found.hexdigest()[:16]


@dataclass(frozen=True)
class Command:
    """What is killed.

    Attributes:
        line: of its arguments, with {output} and {folder}.
        found: looks at its output.
        replaced: whether what counts may be removed later, as old checkpoints are.
    """

    line: str
    found: Callable[[Path], Found]
    replaced: bool = False

    def start(self, folder: Path, output: Path) -> subprocess.Popen:
        """Start it in a session of its own; what it says goes to a file."""
        line = self.line.format(folder=folder, output=output).split()
        environment = os.environ | {
            "JAX_PLATFORMS": "cpu",
            "JAX_COMPILATION_CACHE_DIR": str(folder / "cache"),
            "PYTHONPATH": str(ROOT),
        }
        with (folder / "said.txt").open("w") as said:
            return subprocess.Popen(
                [sys.executable, *line],
                **{"cwd": ROOT, "env": environment, "start_new_session": True},
                **{"stdout": said, "stderr": said},
            )


COMMANDS = {
    "train": Command(
        "train.py --config={folder}/config.py --config.data.root={folder}/data "
        "--workdir={output}",
        of_training,
        replaced=True,
    ),
    "preprocess": Command(
        "preprocess.py --source={folder}/data --store={output} --workers=2",
        of_store,
    ),
    "predict": Command(
        "predict.py --workdir={folder}/whole/train --input={folder}/scans "
        "--output={output} --statistics",
        of_predictions,
    ),
    "evaluate": Command(
        "evaluate.py --workdir={folder}/whole/train --output={output}", of_evaluation
    ),
    "evaluate files": Command(
        "evaluate.py --predictions={folder}/whole/predict --data_root={folder}/data "
        "--output={output} --workers=2",
        of_evaluation,
    ),
}


def prepare(folder: Path) -> None:
    """Make scans, a config, and the output of each undisturbed command."""
    from swinsmt_jax.phantoms import dataset as phantom

    if not (folder / "config.py").exists():
        phantom.write_dataset(
            folder / "data", train=4, val=1, test=6, spacing=10.0, seed=0
        )
        (folder / "scans").mkdir(exist_ok=True)
        for name in range(1, 12):
            scan = folder / "scans" / f"s{name:04}.nii.gz"
            scan.write_bytes(
                (folder / "data" / scan.stem[:5] / "ct.nii.gz").read_bytes()
            )
        files.write_text(folder / "config.py", CONFIG)
    for name, command in COMMANDS.items():
        output = folder / "whole" / name.replace(" ", "_")
        (folder / "whole").mkdir(exist_ok=True)
        for _ in range(2):  # the second finds compiled programs, and is timed
            if (folder / f"{output.name}.json").exists():
                continue
            files.remove(output) if output.exists() else None
            start = time.monotonic()
            status = command.start(folder, output).wait()
            assert status == 0, (folder / "said.txt").read_text()
            seconds = time.monotonic() - start
        if not (folder / f"{output.name}.json").exists():
            content = {"seconds": seconds, "found": command.found(output)}
            files.write_json(folder / f"{output.name}.json", content)


def inputs(folder: Path) -> str:
    """Return a digest of all that no command may change."""
    parts = ("data", "scans", "whole", "config.py")
    every = [f for part in parts for f in (folder / part, *(folder / part).rglob("*"))]
    return digest(
        f"{file} {file.stat().st_mtime_ns}".encode()
        for file in sorted(every)
        if file.is_file() and file.name != "lock"
    )


def live(name: str, folder: Path, moment: random.Random) -> dict:
    """Live one life of a command; return what it was and what is wrong after it."""
    command, slug = COMMANDS[name], name.replace(" ", "_")
    whole = json.loads((folder / f"{slug}.json").read_text())
    output, known = folder / slug, folder / f"{slug}_before.json"
    before = json.loads(known.read_text()) if known.exists() else {}
    number = moment.choice(SIGNALS)
    process = command.start(folder, output)
    try:
        status = process.wait(whole["seconds"] * moment.uniform(0.3, 1.2))
        number = None
    except subprocess.TimeoutExpired:
        process.send_signal(number)
        status = process.wait(LONGEST)
    wrong = [] if gone(process.pid, PATIENCE) else ["processes are left"]
    said = (folder / "said.txt").read_text()
    passed_over = status == 1 and "skipped this time" in said
    if number is None and status != 0 and not passed_over:
        wrong.append(f"status {status}: {said[-300:]}")
    usual = status in (0, *ENDED.get(number, (status,)), -(number or 0))
    if not usual and not passed_over:
        wrong.append(f"{number.name}: status {status}: {said[-300:]}")
    found = command.found(output)
    expected = whole["found"].get  # but of checkpoints that are there no more
    wrong += [
        f"{k} differs"
        for k, v in found.items()
        if expected(k, v if k.startswith("checkpoint") else None) != v
    ]
    lost = [k for k in before if k not in found and not command.replaced]
    if command.replaced and last(found) < last(before):
        lost.append(f"checkpoint {last(before)}")
    wrong += [f"{k} is lost" for k in lost]
    if status == 0:
        needed = {k for k in whole["found"] if not k.startswith("checkpoint")}
        if command.replaced:  # a signal saves other steps, and old ones are dropped
            needed.add(f"checkpoint {last(whole['found'])}")
        wrong += [f"{k} is missing" for k in sorted(needed - found.keys())]
        left = list(output.rglob(f"{files.PARTIAL}*")) + list(output.rglob("*-tmp*"))
        wrong += [f"{path} is left" for path in left]
        files.remove(output)
        known.unlink(missing_ok=True)
    else:
        files.write_json(known, found)
    return {
        "command": name,
        "signal": number and number.name,
        "status": status,
        "things": len(found),
        "passed_over": passed_over,
        "wrong": wrong,
    }


def last(found: Found) -> int:
    """Return the step of the last checkpoint."""
    steps = [int(k.split()[1]) for k in found if k.startswith("checkpoint")]
    return max(steps, default=0)


def gone(session: int, patience: float) -> bool:
    """Whether all processes of a session end within so many seconds."""
    deadline = time.monotonic() + patience
    while time.monotonic() < deadline:
        try:
            os.killpg(session, 0)
        except ProcessLookupError:
            return True
        time.sleep(0.1)
    return False


def main(options: flags.FlagValues) -> None:
    """Live so many lives, print what was wrong, and write the report."""
    folder = Path(options.folder).resolve()
    folder.mkdir(parents=True, exist_ok=True)
    prepare(folder)
    before, record = inputs(folder), folder / "rounds.jsonl"
    rounds = (
        [json.loads(line) for line in record.read_text().splitlines()]
        if (record.exists())
        else []
    )
    spent = sum(r["seconds"] for r in rounds)
    names = list(COMMANDS)
    while len(rounds) < len(names) if options.quick else spent < 60 * options.minutes:
        start, number = time.monotonic(), len(rounds)
        found = live(names[number % len(names)], folder, random.Random(number))
        if inputs(folder) != before:
            found["wrong"].append("inputs have changed")
        found["seconds"] = time.monotonic() - start
        rounds.append(found)
        spent += found["seconds"]
        with record.open("a") as lines:
            lines.write(json.dumps(found) + "\n")
        print(number, json.dumps(found), flush=True)
    headline = summary(rounds)
    show(headline)
    save(headline)


def summary(rounds: list[dict]) -> dict:
    """Count lives, kills and what was wrong."""
    killed = [r for r in rounds if r["signal"] and r["status"] not in (0, 1)]
    by_command = Counter(r["command"] for r in killed)
    return {
        "minutes": round(sum(r["seconds"] for r in rounds) / 60, 1),
        "kills": len(killed),
        **{f"kills_{k.replace(' ', '_')}": n for k, n in sorted(by_command.items())},
        **{s: n for s, n in sorted(Counter(r["signal"] for r in killed).items())},
        "ended_whole": sum(r["status"] == 0 for r in rounds),
        "passed_over": sum(r["passed_over"] for r in rounds),
        "things_compared": sum(r["things"] for r in rounds),
        "wrong": sum(bool(r["wrong"]) for r in rounds),
    }


if __name__ == "__main__":
    flags.DEFINE_string("folder", None, "that keeps the soak", required=True)
    flags.DEFINE_integer("minutes", 60, "of all lives together")
    run(main, quick="one life of each command")
