"""The wheel works alone: in an empty environment, away from the checkout."""

import os
import shutil
import subprocess
import sys
import tomllib
import venv
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PROJECT = ("swinsmt_jax", "pyproject.toml", "requirements.txt", "README.md", "LICENSE")
COMMANDS = (
    "phantoms --root=data --cases=3 --val=1 --test=1 --spacing=12 --seed=0",
    "train --config=demo --workdir=run --config.data.root=data "
    "--config.training.num_steps=2 --config.optimizer.warmup_steps=1 "
    "--config.model.feature_size=12 --config.data.patch_shape=(32,32,32)",
    "predict --workdir=run --input=data/s0001/ct.nii.gz --output=out",
    "evaluate --workdir=run --split=test",
)


def test_the_wheel_takes_all_files_of_the_package():
    setup = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    taken = ("*.py", "*.pyc", *setup["package-data"]["swinsmt_jax"])
    for file in (ROOT / "swinsmt_jax").rglob("*.*"):
        path = file.relative_to(ROOT / "swinsmt_jax")
        assert file.is_dir() or any(path.match(pattern) for pattern in taken), path


@pytest.mark.slow
def test_the_wheel_has_the_command_and_the_configs(tmp_path):
    source, programs = tmp_path / "source", tmp_path / "env" / "bin"
    source.mkdir()
    for name in PROJECT:
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, source / name)
    venv.create(programs.parent, with_pip=True)

    def run(*command):
        env = {"PATH": "/usr/bin:/bin", "HOME": str(tmp_path), "JAX_PLATFORMS": "cpu"}
        env["XLA_FLAGS"] = os.environ["XLA_FLAGS"]  # compiles as all tests do
        options = {"cwd": tmp_path, "env": env, "capture_output": True, "text": True}
        done = subprocess.run([str(word) for word in command], **options)
        assert done.returncode == 0, done.stderr[-3000:]
        return done.stdout

    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    build = [*pip, "wheel", "--no-deps", f"--wheel-dir={tmp_path}", source]
    subprocess.run(build, check=True)
    (wheel,) = tmp_path.glob("*.whl")
    subprocess.run([programs / "python", *pip[1:], "install", wheel], check=True)

    said = [run(programs / "swinsmt", *line.split()) for line in COMMANDS]
    assert "Dice (%)" in said[-1]
    assert (tmp_path / "out" / "s0001.nii.gz").is_file()
    assert any((tmp_path / ".cache" / "swinsmt_jax").iterdir())
    file = run(programs / "python", "-c", "import swinsmt_jax as s; print(s.__file__)")
    assert file.startswith(str(programs.parent))
