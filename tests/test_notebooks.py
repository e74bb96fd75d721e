"""The notebooks of examples/ run from top to bottom."""

import os
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

from swinsmt_jax.phantoms.dataset import write_dataset

ROOT = Path(__file__).resolve().parents[1]
TINY = (
    *("train.py", "--config=demo", "--workdir=runs/demo"),
    *("--config.training.num_steps=1", "--config.optimizer.warmup_steps=1"),
    *("--config.model.feature_size=12", "--config.data.patch_shape=(32,32,32)"),
)
pytestmark = pytest.mark.slow


@pytest.fixture
def execute(tmp_path, monkeypatch):
    """The function that executes a notebook as in a checkout's folder of examples."""
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    (tmp_path / "examples").mkdir()

    def execute(name):
        notebook = nbformat.read(ROOT / "examples" / name, as_version=4)
        path = {"metadata": {"path": str(tmp_path / "examples")}}
        NotebookClient(notebook, timeout=600, resources=path).execute()
        streams = (o for cell in notebook.cells for o in cell.get("outputs", ()))
        return "".join(o.get("text", "") for o in streams)

    return execute


def test_the_network_and_its_routing(execute):
    told = execute("network_and_routing.ipynb")
    assert "logits (1, 64, 64, 64, 118) float32" in told
    assert "equal bit for bit: True" in told and "170,783,560 parameters" in told


def test_from_a_scan_to_a_report(execute, tmp_path):
    write_dataset(
        tmp_path / "data/phantoms", train=1, val=1, test=1, spacing=12, seed=0
    )
    command = [sys.executable, str(ROOT / TINY[0]), *TINY[1:]]
    subprocess.run(command, cwd=tmp_path, check=True)
    told = execute("scan_to_report.ipynb")
    assert "Dice (%)" in told and "report.html" in told
    assert (tmp_path / "runs/report/labels.nii.gz").is_file()
