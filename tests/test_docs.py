"""The code of the documentation runs."""

import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from swinsmt_jax import checks, config, models
from swinsmt_jax.training import losses
from swinsmt_jax.training.step import loss_and_accuracy_counts

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def own_network(tmp_path):
    """The example of docs/networks.md, as a file outside of the repository."""
    text = (ROOT / "docs" / "networks.md").read_text()
    (code,) = re.findall(r"^```python\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    assert len(code.splitlines()) < 60
    path = tmp_path / "my_network.py"
    path.write_text(code)
    return path


def test_a_network_of_ones_own_is_made_from_its_name(own_network, monkeypatch):
    monkeypatch.setattr(config, "MODEL_CONFIGS", dict(config.MODEL_CONFIGS))
    monkeypatch.setattr(models, "NETWORKS", dict(models.NETWORKS))
    runpy.run_path(str(own_network), run_name="my_network")
    values = {"name": "my_network", "in_channels": 1, "out_channels": 5}
    own = config.model_from_dict(values)
    asked = ("dtype", "remat", "total_stride", "input_shape")
    assert all(hasattr(own, name) for name in asked)
    model = nnx.eval_shape(lambda: models.create(own, rngs=nnx.Rngs(0)))
    graphdef, params = nnx.split(model)
    logits = jax.eval_shape(
        lambda p: nnx.merge(graphdef, p)(jnp.zeros((2, 4, 6, 8, 1))), params
    )
    assert logits.shape == (2, 4, 6, 8, 5) and logits.dtype == jnp.float32
    loss, _ = jax.eval_shape(
        lambda p, y: loss_and_accuracy_counts(
            nnx.merge(graphdef, p),
            jnp.zeros((*y.shape, 1)),
            y,
            loss=losses.make("dice_ce"),
        ),
        params,
        jnp.zeros((2, 4, 6, 8), jnp.uint8),
    )
    assert loss.shape == ()
    with pytest.raises(checks.UserError, match="multiple of 2"):
        nnx.merge(graphdef, params)(jnp.zeros((2, 4, 5, 8, 1)))


@pytest.mark.slow
def test_a_network_of_ones_own_trains(own_network):
    done = subprocess.run(
        [sys.executable, own_network.name],
        cwd=own_network.parent,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    rows = (own_network.parent / "my_run" / "metrics.jsonl").read_text()
    assert '"val_dice"' in rows
