"""A real network over a phantom, from the files on disk to the files of results."""

import csv
import json

import jax
import numpy as np
import pytest
from flax import nnx

from swinsmt_jax import labels, models
from swinsmt_jax.config import from_config_dict
from swinsmt_jax.evaluation import averages, published_results, surface
from swinsmt_jax.evaluation.evaluate_split import evaluate_split
from swinsmt_jax.phantoms import dataset as phantom


def network(config, rng):
    """A Swin SMT with arbitrary parameters, made without compiling initialisers."""
    shapes = nnx.eval_shape(lambda: models.create(config, rngs=nnx.Rngs(0)))
    graph, state = nnx.split(shapes)
    draw = lambda x: rng.normal(0, 0.1, x.shape).astype(x.dtype)  # noqa: E731
    return nnx.merge(graph, jax.tree.map(draw, state))


@pytest.fixture
def config(tmp_path):
    phantom.write_dataset(
        tmp_path / "data", train=0, val=0, test=2, spacing=12.0, seed=0
    )
    return from_config_dict(
        {
            "model": {
                "name": "swin_smt",
                "in_channels": 1,
                "out_channels": 118,
                "feature_size": 12,
                "num_experts": 2,
                "num_moe_stages": 1,
            },
            "data": {
                "root": str(tmp_path / "data"),
                "patch_shape": (32, 32, 32),
                "batch_size": 1,
            },
            "optimizer": {"learning_rate": 1e-3},
            "training": {"num_steps": 1},
            "inference": {"overlap": 0.0, "window_batch": 2},
        }
    )


@pytest.mark.slow
def test_a_phantom_is_evaluated_from_end_to_end(config, tmp_path, rng):
    output = tmp_path / "deep" / "results"
    options = dict(split="test", groups=labels.GROUPS, rule="over_pairs", step=7)
    options["surface_rule"] = surface.SurfaceRule()
    table = evaluate_split(network(config.model, rng), config, output=output, **options)
    content = json.loads((output / "results.json").read_text())
    assert len(content["cases"]) == 2 and content["step"] == 7
    with (output / "per_class.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["class"] for row in rows] == list(labels.CLASS_NAMES[1:])
    with (output / "per_case.csv").open(newline="") as file:
        assert [r["case"] for r in csv.DictReader(file)] == list(content["cases"])
    scores = [[np.nan, *case["dice"].values()] for case in content["cases"].values()]
    means = averages.averages(np.array(scores, float))
    assert content["dice"]["overall"] == pytest.approx(means["over_pairs"], abs=1e-6)
    assert f"{100 * means['over_pairs']:.2f}" in table
    assert (output / "overview.png").stat().st_size > 10_000
    assert content["parameters"] > 1e5 and content["gflop_per_window"] > 1
    assert set(content["surface_dice"]) == {*labels.GROUPS, "overall"}
    page = (output / "report.html").read_text()
    assert all(page.count(name) >= 2 for name in content["cases"])
    assert not any(row["network"] in page for row in published_results.ROWS)
