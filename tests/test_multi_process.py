"""The scripts in two processes that meet over loopback, four virtual devices each."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from swinsmt_jax.training.logs import read_rows

ROOT = Path(__file__).parents[1]
CONFIG = '''
"""Three steps of a small network whose experts lie on all eight devices."""

from swinsmt_jax.configs import demo


def get_config():
    config = demo.get_config()
    network = {"feature_size": 12, "depths": (1, 1, 1, 1), "num_experts": 8}
    config.model.update(network)
    config.mesh.update({"expert": 8})
    config.data.update({"patch_shape": (32, 32, 32), "batch_size": 8})
    config.optimizer.update({"warmup_steps": 1})
    config.training.update({"num_steps": 3, "eval_cases": 3})
    config.training.update({"log_every": 1, "checkpoint_every": 1})
    config.inference.update({"overlap": 0.0})
    return config
'''


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


def launch(*arguments, devices, **variables):
    """Start a script on so many virtual CPU devices."""
    devices = {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": devices}
    environment = os.environ | devices | variables
    return subprocess.Popen(
        [sys.executable, *arguments],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(process):
    try:
        out, err = process.communicate(timeout=900)
    finally:
        process.kill()
    return process.returncode, out, err


def table_of(out):
    """Lines of the printed table without its timings; Gloo prints around it."""
    lines = out.splitlines()
    starts = [i for i, line in enumerate(lines) if "cases of the split" in line]
    if not starts:
        return []
    return [line for line in lines[starts[0] :] if "s a scan" not in line]


def alone(*arguments):
    """Run in one process with eight devices; (status, stdout, stderr)."""
    return finish(launch(*arguments, devices="8"))


def in_two(*arguments):
    """Run in two processes with four devices each; a list of results as of `alone`."""
    address = f"--coordinator_address=127.0.0.1:{free_port()}"
    flags = (address, "--num_processes=2")
    processes = [
        launch(*arguments, *flags, f"--process_id={i}", devices="4") for i in (0, 1)
    ]
    return [finish(process) for process in processes]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    root = tmp_path_factory.mktemp("phantoms")
    command = [
        *(sys.executable, "-m", "swinsmt_jax.phantoms", f"--root={root}"),
        *"--cases=6 --val=3 --test=0 --spacing=12 --seed=0".split(),
    ]
    subprocess.run(command, check=True, cwd=ROOT)
    return root


@pytest.fixture(scope="module")
def training(tmp_path_factory):
    """The command that trains on a data folder in a workdir."""
    config = tmp_path_factory.mktemp("config") / "small.py"
    config.write_text(CONFIG)

    def command(data, workdir):
        flags = (f"--config={config}", f"--workdir={workdir}")
        return ["train.py", *flags, f"--config.data.root={data}"]

    return command


def curve(workdir):
    rows = read_rows(workdir / "metrics.jsonl")
    assert [row["step"] for row in rows] == [1, 2, 3]
    return np.array([[row["loss"], row["grad_norm"]] for row in rows])


@pytest.mark.slow
def test_two_processes_train_as_one_resume_and_are_evaluated(training, data, tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    status, _, err = alone(*training(data, one))
    assert status == 0, err
    results = in_two(*training(data, two))
    assert [status for status, _, _ in results] == [0, 0], results
    assert "2 processes of 4 devices each" in results[0][2]
    assert "validation Dice" in results[0][2]
    assert "training" not in results[1][2] and "loop.py" not in results[1][2]
    np.testing.assert_allclose(curve(two), curve(one), rtol=1e-4)
    assert len(list((two / "tensorboard").iterdir())) == 1
    wanted, validation = (
        read_rows(workdir / "metrics.jsonl")[-1]["val_dice"] for workdir in (one, two)
    )
    assert validation == pytest.approx(wanted, abs=1e-3)

    finished = (two / "metrics.jsonl").read_text()
    results = in_two(*training(data, two))
    assert [status for status, _, _ in results] == [0, 0], results
    assert "all 3 steps are done" in results[0][2]
    assert (two / "metrics.jsonl").read_text() == finished

    whole = curve(two)
    shutil.rmtree(two / "checkpoints" / "3")  # as if killed before it was written
    results = in_two(*training(data, two))
    assert [status for status, _, _ in results] == [0, 0], results
    assert "continuing after step 2 of 3" in results[0][2]
    np.testing.assert_allclose(curve(two), whole, rtol=1e-6)

    shutil.copytree(two, three := tmp_path / "three")
    shutil.rmtree(three / "checkpoints" / "3")
    status, _, err = alone(*training(data, three))  # of two processes' checkpoint
    assert status == 0 and "continuing after step 2 of 3" in err, err
    np.testing.assert_allclose(curve(three), whole, rtol=1e-4)

    command = ["evaluate.py", f"--workdir={two}", "--split=val", "--step=latest"]
    status, out, err = alone(*command)
    assert status == 0 and "3 cases of the split 'val'" in out, err
    report = two / "eval_val" / "results.json"
    single = json.loads(report.read_text())
    assert single["dice"]["overall"] == pytest.approx(validation, abs=1e-6)
    report.unlink()
    (_, first, _), (_, second, _) = results = in_two(*command)
    assert [status for status, _, _ in results] == [0, 0], results
    table = table_of(out)
    assert any(line.startswith("Dice (%)") for line in table)
    assert table_of(first) == table and table_of(second) == []
    double = json.loads(report.read_text())
    assert list(double["cases"]) == list(single["cases"])
    assert double["dice"] == single["dice"]


@pytest.mark.slow
def test_what_processes_of_slurm_refuse_is_said_once(training, data, tmp_path):
    """Found by SLURM's variables, as srun sets them for two processes of a node."""
    slurm = {
        "SLURM_JOB_ID": "1",
        "SLURM_STEP_NODELIST": "localhost",
        "SLURM_NTASKS": "2",
        "JAX_COORDINATOR_PORT": free_port(),
    }
    command = training(data / "missing", tmp_path / "run")
    started = [
        launch(
            *(*command, "--distributed=auto"),
            **{"devices": "4", "SLURM_PROCID": i, "SLURM_LOCALID": i, **slurm},
        )
        for i in "01"
    ]
    results = [finish(process) for process in started]
    assert [status for status, _, _ in results] == [2, 2], results
    said = [err.count("missing does not exist") for _, _, err in results]
    assert said == [1, 0]
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_a_signal_to_one_process_ends_both_saved(training, data, tmp_path):
    more = "--config.training.num_steps=400", "--config.training.checkpoint_every=400"
    address = f"--coordinator_address=127.0.0.1:{free_port()}"
    command = [*training(data, tmp_path / "run"), *more]
    processes = [
        launch(*command, address, "--num_processes=2", f"--process_id={i}", devices="4")
        for i in (0, 1)
    ]
    deadline = time.monotonic() + 600
    while len(read_rows(tmp_path / "run" / "metrics.jsonl")) < 2:
        assert time.monotonic() < deadline and processes[0].poll() is None
        time.sleep(0.1)
    processes[1].send_signal(signal.SIGTERM)
    results = [finish(process) for process in processes]
    assert [status for status, _, _ in results] == [75, 75], results
    assert "SIGTERM received: stopped after step" in results[0][2]
    steps = len(read_rows(tmp_path / "run" / "metrics.jsonl"))
    assert [p.name for p in (tmp_path / "run" / "checkpoints").iterdir()] == [
        str(steps)
    ]
