"""The recipes of docs/extending.md run."""

import re
from pathlib import Path

import jax
import numpy as np
import pytest

from swinsmt_jax.training import losses

PAGE = Path(__file__).resolve().parents[1] / "docs" / "extending.md"


def recipe(heading):
    """Return the Python code of a section."""
    (section,) = re.findall(
        rf"^## {heading}\n(.*?)(?=^## |\Z)", PAGE.read_text(), re.M | re.S
    )
    return "\n".join(re.findall(r"^```python\n(.*?)^```", section, re.M | re.S))


def test_a_loss(rng, monkeypatch):
    monkeypatch.setattr(losses, "LOSSES", dict(losses.LOSSES))
    monkeypatch.setattr(losses, "BLOCK", 1)  # a plane at a time
    exec(recipe("A loss"), {})
    loss = losses.make("jaccard_ce")
    features = rng.normal(size=(2, 4, 4, 4, 3)).astype(np.float32)
    labels = (features.sum(-1) > 0).astype(np.uint8)
    head = rng.normal(size=(3, 2)).astype(np.float32), np.zeros(2, np.float32)
    descend = jax.jit(
        jax.value_and_grad(lambda h: loss.of_features(features, *h, labels))
    )
    found = []
    for _ in range(20):
        value, gradient = descend(head)
        found.append(float(value))
        head = jax.tree.map(lambda p, g: p - g, head, gradient)
    assert found[-1] < 0.7 * found[0]
    logits = features @ head[0] + head[1]
    assert float(loss(logits, labels)) == pytest.approx(float(descend(head)[0]), 1e-5)
