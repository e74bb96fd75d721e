"""Every command and snippet of the README runs as it stands, in order.

Flags that make the network, the patch and the run small are appended. The data are
phantoms in the folder and with the voxel size of TotalSegmentator-V2.
"""

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from swinsmt_jax.phantoms.dataset import write_dataset

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()
SMALL = {
    "train.py": (
        "--config.model.feature_size=12 --config.model.num_experts=2 "
        "--config.model.window_size=(4,4,4) --config.model.remat=() "
        "--config.data.patch_shape=(32,32,32) --config.data.batch_size=1 "
        "--config.optimizer.warmup_steps=1 --config.training.num_steps=2"
    ),
    "predict.py": "--fast",
}


def blocks(language):
    return re.findall(rf"^```{language}\n(.*?)^```", README, re.DOTALL | re.MULTILINE)


def commands():
    """The README's commands that start with python, in order."""
    lines = "".join(blocks("sh")).replace("\\\n", "").splitlines()
    return [line for line in lines if line.startswith("python ")]


def test_the_readme_is_short():
    assert len(README.split()) <= 900  # code included
    assert sum(line.startswith("|") for line in README.splitlines()) <= 15


def test_what_the_readme_names_exists():
    for path in re.findall(r"\]\((?!http)([^)#]+)", README):
        assert (ROOT / path).exists(), path
    for target in re.findall(r"^make (\w+)", "".join(blocks("sh")), re.MULTILINE):
        assert f"\n{target}:" in (ROOT / "Makefile").read_text(), target


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A checkout's scripts and configs, and phantoms where the dataset would be."""
    folder = tmp_path_factory.mktemp("readme")
    for name in ("preprocess.py", "train.py", "evaluate.py", "predict.py", "configs"):
        (folder / name).symlink_to(ROOT / name)
    data = folder / "data" / "Totalsegmentator_dataset_v201"
    write_dataset(data, train=2, val=1, test=1, spacing=12, seed=0)
    for file in data.rglob("*.nii.gz"):
        image = nib.load(file)
        affine = image.affine @ np.diag([1.5 / 12] * 3 + [1])
        array = np.asarray(image.dataobj)
        nib.save(nib.Nifti1Image(array, affine), file)
    scans = folder / "scans"
    scans.mkdir()
    shutil.copy(next(data.glob("*/ct.nii.gz")), scans / "a.nii.gz")
    shutil.copy(scans / "a.nii.gz", folder / "scan.nii.gz")
    return folder


def run(folder, *arguments):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(
        [sys.executable, *arguments],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


@pytest.mark.slow
def test_the_commands_run_as_they_stand(folder):
    lines = commands()
    assert [line.split()[1] for line in lines] == [
        "preprocess.py",
        "train.py",
        "evaluate.py",
        "predict.py",
    ]
    said = {}
    for line in lines:
        _, script, *flags = shlex.split(line)
        said[script] = run(folder, script, *flags, *SMALL.get(script, "").split())
    assert "Dice (%)" in said["evaluate.py"]
    assert "1 segmented" in said["predict.py"]
    assert (folder / "out" / "a_statistics.csv").exists()

    network, prediction = blocks("python")
    run(folder, "-c", network)
    run(folder, "-c", prediction)
    labels = nib.load(folder / "labels.nii.gz")
    assert labels.shape == nib.load(folder / "scan.nii.gz").shape
