"""What a run survives, with the real script in real processes."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from flax import nnx

from swinsmt_jax.phantoms import dataset as phantom
from swinsmt_jax.training.checkpoint import load_model
from swinsmt_jax.training.logs import read_rows

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[1]
STEPS = 120
CONFIG = '''
"""A small network with everything that a run carries along."""

from swinsmt_jax.configs import demo


def get_config():
    config = demo.get_config()
    config.model = {model}
    config.data.patch_shape = (32, 32, 32)
    config.data.augmentations.rotate.probability = 0.5
    config.optimizer.update({{"warmup_steps": 5}})
    config.training.update({{"num_steps": {steps}, "ema_decay": 0.9, "eval_cases": 1}})
    config.training.update({{"log_every": 1, "checkpoint_every": 3}})
    config.inference.update({{"overlap": 0.0}})
    return config
'''
CLASSES = {"in_channels": 1, "out_channels": 118}
NNUNET = {
    **CLASSES,
    "name": "nnunet_plain",  # starts sooner than the others
    "features_per_stage": (8, 16, 32),
    "strides": (1, 2, 2),
    "n_conv_per_stage": (1, 1, 1),
    "n_conv_per_stage_decoder": (1, 1),
}
SWIN_SMT = {
    **CLASSES,
    "name": "swin_smt",
    "feature_size": 12,
    "depths": (1, 1, 1, 1),
    "window_size": (4, 4, 4),
    "num_experts": 8,
    "num_moe_stages": 3,
}


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory):
    """A cache of their own for processes that are killed: it may get half an entry."""
    with pytest.MonkeyPatch.context() as patch:
        cache = tmp_path_factory.mktemp("cache")
        patch.setenv("JAX_COMPILATION_CACHE_DIR", str(cache))
        yield


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    root = tmp_path_factory.mktemp("data")
    phantom.write_dataset(root, train=3, val=1, test=1, spacing=12.0, seed=0)
    return root


def command_line(data, config, model):
    """Return the command of a run, but for its workdir, and write its config."""
    config.write_text(CONFIG.format(model=model, steps=STEPS))
    return (
        *(sys.executable, "train.py", f"--config={config}"),
        f"--config.data.root={data}",
    )


@pytest.fixture(scope="module")
def command(data, tmp_path_factory):
    return command_line(data, tmp_path_factory.mktemp("run") / "config.py", NNUNET)


def start(command, workdir, *more, devices="1"):
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": devices}
    return subprocess.Popen(
        [*command, f"--workdir={workdir}", *more],
        cwd=ROOT,
        env=environment,
        stderr=subprocess.PIPE,
        text=True,
    )


def run(command, workdir, *more, **options):
    """Run to the end; return the exit status and what was said."""
    process = start(command, workdir, *more, **options)
    _, said = process.communicate(timeout=600)
    return process.returncode, said


@pytest.fixture(scope="module")
def undisturbed(command, tmp_path_factory):
    """The workdir of a run that nobody disturbed."""
    workdir = tmp_path_factory.mktemp("undisturbed") / "run"
    status, said = run(command, workdir)
    assert status == 0, said
    return workdir


def wait_for(process, workdir, rows):
    """Wait until so many steps are logged, or the process has ended."""
    deadline = time.monotonic() + 300
    while len(read_rows(workdir / "metrics.jsonl")) < rows and process.poll() is None:
        assert time.monotonic() < deadline, f"no {rows} steps in 300 s"
        time.sleep(0.01)


def curve(workdir):
    names = ("step", "loss", "grad_norm", "learning_rate")
    rows = read_rows(workdir / "metrics.jsonl")
    return [tuple(row[name] for name in names) for row in rows]


def assert_same_run(one, other):
    """All losses and the final parameters are equal bit by bit."""
    assert curve(one) == curve(other)
    assert [row[0] for row in curve(one)] == list(range(1, STEPS + 1))
    (_, one, a), (_, other, b) = (load_model(w, step="latest") for w in (one, other))
    assert a["step"] == b["step"] == STEPS
    jax.tree.map(np.testing.assert_array_equal, nnx.state(one), nnx.state(other))


def test_ten_kills_change_nothing(command, undisturbed, tmp_path):
    workdir, moment = tmp_path / "run", random.Random(0)
    kills = 0
    while kills < 10:
        process = start(command, workdir)
        done = len(read_rows(workdir / "metrics.jsonl"))
        wait_for(process, workdir, min(done + moment.randint(1, 4), STEPS))
        time.sleep(moment.random() * 0.3)  # in a step, between steps, or in a save
        assert process.poll() is None, process.communicate()[1]
        process.kill()
        process.communicate()
        kills += 1
    status, said = run(command, workdir)
    assert status == 0, said
    assert_same_run(undisturbed, workdir)
    starts = json.loads((workdir / "run.json").read_text())["starts"]
    assert len(starts) == 11


def test_sigterm_saves_and_says_how_to_go_on(command, undisturbed, tmp_path):
    process = start(command, tmp_path / "run")
    wait_for(process, tmp_path / "run", 4)
    process.send_signal(signal.SIGTERM)
    _, said = process.communicate(timeout=300)
    assert process.returncode == 75
    assert "SIGTERM received: stopped after step" in said and "Traceback" not in said
    status, said = run(command, tmp_path / "run")
    assert status == 0, said
    assert_same_run(undisturbed, tmp_path / "run")


def test_a_full_disk_leaves_the_checkpoint_before(command, undisturbed, tmp_path):
    # As a quota: what is longer than 200 KiB cannot be written. By the shell, since a
    # `preexec_fn` would fork this process, in which JAX may have threads.
    limited = "bash", "-c", 'ulimit -f 200 && exec "$@"', "bash", *command
    short = "--config.training.num_steps=5", "--config.training.checkpoint_every=5"
    assert run(command, tmp_path / "run", *short)[0] == 0
    more = "--config.training.num_steps=9", "--config.training.checkpoint_every=9"
    status, said = run(limited, tmp_path / "run", *more)
    assert status == 2, said
    assert "train.py: a checkpoint could not be written" in said
    assert "complete checkpoint is that of step 5, and it is intact" in said
    assert load_model(tmp_path / "run")[2]["step"] == 5
    assert run(command, tmp_path / "run", *more)[0] == 0
    assert load_model(tmp_path / "run", step="latest")[2]["step"] == 9


def test_a_run_of_eight_devices_continues_on_other_meshes(data, tmp_path):
    """From 4 x 2 devices to 2, 1 and 1 x 8; the experts of a Swin SMT are divided."""
    command = command_line(data, tmp_path / "config.py", SWIN_SMT)
    short = ("--config.training.num_steps=4", "--config.training.checkpoint_every=2")
    short += ("--config.data.batch_size=8", "--config.optimizer.warmup_steps=1")

    def train(workdir, data, expert):
        mesh = f"--config.mesh.data={data}", f"--config.mesh.expert={expert}"
        status, said = run(command, workdir, *short, *mesh, devices="8")
        assert status == 0, said
        return np.array([row[1:3] for row in curve(workdir)])

    whole = train(tmp_path / "half", 4, 2)
    shutil.rmtree(tmp_path / "half" / "checkpoints" / "4")
    for data, expert in ((2, 1), (1, 1), (1, 8)):
        workdir = tmp_path / f"{data} x {expert}"
        shutil.copytree(tmp_path / "half", workdir)
        found = train(workdir, data, expert)
        np.testing.assert_allclose(found[:, 0], whole[:, 0], rtol=1e-4)
        assert len(found) == 4
