"""The commands of docs/data.md under "Your own data" run."""

import math
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from swinsmt_jax.data import store
from swinsmt_jax.data.preprocess import preprocess

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def commands():
    text = (ROOT / "docs" / "data.md").read_text().split("\n## Your own data")[1]
    text = text.partition("\n## ")[0]
    return re.findall(r"^```sh\n(.*?)^```", text, re.DOTALL | re.MULTILINE)


@pytest.fixture
def run(tmp_path):
    """The function that runs a block of commands in a folder with the scripts."""
    for name in ("preprocess", "train", "evaluate", "predict"):
        (tmp_path / f"{name}.py").symlink_to(ROOT / f"{name}.py")
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    environment = os.environ | {"PATH": path, "PYTHONPATH": str(ROOT)}
    environment |= {"JAX_PLATFORMS": "cpu"}

    def run(block):
        done = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", block],
            cwd=tmp_path,
            env=environment,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    return run


def shape_of(root, split):
    (case,) = store.find_cases(root, split=split)
    assert case.facts["counts"][1] > 0
    return case.shape


@pytest.mark.slow
def test_other_layouts_are_preprocessed(commands, run, tmp_path):
    _, described, nnunet = commands
    told = run(described)
    assert "3 cases (1 train, 1 val, 1 test)" in told
    assert re.search(r"MB a case.*3 written now, .* cases/minute", told)
    assert "3 cases (2 train, 1 val, 0 test)" in run(nnunet)
    options = store.read_options(tmp_path / "data/nnunet_store")
    assert options.classes.names == ("background", "liver") and options.spacing == 15
    one = shape_of(tmp_path / "data/parts_store", "test")
    other = shape_of(tmp_path / "data/nnunet_store", "val")
    assert other == tuple(math.ceil(n * 12 / 15) for n in one)


@pytest.mark.slow
def test_a_subset_is_trained_evaluated_and_predicted(commands, run, tmp_path):
    assert "num_steps=100" in commands[0]
    few = "num_steps=4 --config.optimizer.warmup_steps=1"
    run(commands[0].replace("num_steps=100", few))
    assert list((tmp_path / "runs/mine").glob("eval_*"))
    assert (tmp_path / "out" / "s0001.nii.gz").is_file()


def test_a_store_may_lie_in_a_parent_folder(tmp_path, monkeypatch, root):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    assert preprocess("../dataset", "../store", spacing=0.0) == {}
    (case,) = store.find_cases("../store", split="train")
    assert case.read().image.shape and (tmp_path / "store" / "s0001").is_dir()
