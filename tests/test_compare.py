import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from benchmarks import compare, small_networks
from swinsmt_jax.checks import UserError
from swinsmt_jax.config import from_config_dict

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(autouse=True)
def few_replicates(monkeypatch):
    monkeypatch.setattr(compare, "REPLICATES", 200)


@pytest.mark.parametrize("size", small_networks.SIZES)
@pytest.mark.parametrize("name", small_networks.MODELS)
def test_every_small_network_is_a_valid_experiment(name, size):
    values = small_networks.experiment(name, size=size, patch_shape=(32, 32, 64))
    config = from_config_dict(values)
    assert config.data.patch_shape == (32, 32, 64)
    assert config.model.out_channels == 118


def test_a_budget_of_operations_gives_the_cheaper_network_more_steps():
    def steps(name, budget, unit="tflop"):
        values = small_networks.experiment(name, size="tiny", patch_shape=(32, 32, 64))
        return compare.steps_of(budget, unit, from_config_dict(values))

    cheap, dear = steps("nnunet_plain", 1.0), steps("unetr", 1.0)
    assert cheap > dear > 100
    assert steps("unetr", 40, "steps") == steps("nnunet_plain", 40, "steps") == 40
    with pytest.raises(UserError, match="budget is 0.001 tflop, but one step takes"):
        steps("unetr", 0.001)


def test_intervals_enclose_the_mean_and_shrink_with_cases(rng):
    def scores(cases):
        found = rng.normal(0.6, 0.1, (2, cases, 118)).clip(0, 1)
        found += rng.normal(0, 0.05, (2, cases, 1))  # what the classes of a case share
        found[:, 0, 5] = np.nan  # a class that a case lacks
        return found

    few, many = scores(4), scores(64)
    low, high = compare.intervals(compare.mean_dice, few)["ribs"]
    assert low < compare.mean_dice(few)["ribs"] < high
    smaller = compare.intervals(compare.mean_dice, many)["ribs"]
    assert np.ptp(smaller) < np.ptp((low, high))


def test_differences_are_resampled_in_pairs(rng):
    first = rng.uniform(0.2, 0.8, (2, 6, 118))
    better = first + 0.05  # in every case alike, however much the cases differ
    assert compare.difference(better, first)["organs"] == pytest.approx(5)
    low, high = compare.intervals(compare.difference, better, first)["organs"]
    assert low == pytest.approx(5) == high


def test_unknown_networks_are_refused():
    with pytest.raises(UserError, match="Did you mean 'swin_unetr'"):
        small_networks.experiment("swin_unet", size="tiny", patch_shape=(32, 32, 64))


@pytest.mark.slow
def test_the_command_compares_two_networks(tmp_path):
    report, picture = tmp_path / "report.json", tmp_path / "picture.png"

    def run(*command):
        done = subprocess.run(
            [sys.executable, "-m", *command], cwd=ROOT, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    data = f"--root={tmp_path / 'data'}"
    said = run("benchmarks.compare", "--quick", data, f"--json={report}")
    assert "unetr – nnunet_plain" in said
    found = json.loads(report.read_text())
    assert "processor" in found["machine"] and "jax" in found["versions"]
    assert set(found["headline"]) == {"dice_nnunet_plain", "dice_unetr"}
    assert all(row["steps"] == 2 for row in found["rows"])
    low, high = found["rows"][1]["difference_interval"]["overall"]
    assert low <= found["rows"][1]["difference"]["overall"] <= high
    measured = f"--measured={ROOT / 'benchmarks/results/networks_cpu.json'}"
    run("benchmarks.table", measured, f"--trained={report}", f"--plot={picture}")
    assert picture.stat().st_size > 0
