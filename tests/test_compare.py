import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from benchmarks import moe_study, small_networks, trials
from swinsmt_jax import class_map
from swinsmt_jax.checks import UserError
from swinsmt_jax.config import from_config_dict

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(autouse=True)
def few_replicates(monkeypatch):
    monkeypatch.setattr(trials, "REPLICATES", 200)


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
        return trials.steps_of(budget, unit, from_config_dict(values))

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
    low, high = trials.intervals(trials.mean_dice, few)["ribs"]
    assert low < trials.mean_dice(few)["ribs"] < high
    smaller = trials.intervals(trials.mean_dice, many)["ribs"]
    assert np.ptp(smaller) < np.ptp((low, high))


def test_differences_are_resampled_in_pairs(rng):
    first = rng.uniform(0.2, 0.8, (2, 6, 118))
    better = first + 0.05  # in every case alike, however much the cases differ
    assert trials.difference(better, first)["organs"] == pytest.approx(5)
    low, high = trials.intervals(trials.difference, better, first)["organs"]
    assert low == pytest.approx(5) == high


@pytest.fixture
def options():
    return SimpleNamespace(
        size="tiny",
        patch=["32", "32", "64"],
        root="phantoms",
        description="",
        batch=1,
        mesh=["1", "1"],
        budget=70.0,
        budget_in="steps",
    )


def test_a_name_changes_keys_of_the_network(options):
    name = "swin_smt+num_experts=2+num_moe_stages=1+routing=streaming"
    model = trials.experiment_of(name, options, class_map.V2).model
    assert (model.num_experts, model.num_moe_stages) == (2, 1)
    assert model.routing == "streaming" and model.dtype == "float32"
    model = trials.experiment_of("swin_smt+fused", options, class_map.V2).model
    assert (model.routing, model.dtype) == ("cudnn", "bfloat16")
    options.mesh, options.batch = ["1", "2"], 2
    config = trials.experiment_of("swin_smt", options, class_map.V2)
    assert config.mesh.expert == 2 == config.data.batch_size
    with pytest.raises(UserError, match="num_expert"):
        trials.experiment_of("swin_smt+num_expert=2", options, class_map.V2)
    with pytest.raises(UserError, match="larger patch or fewer experts"):
        trials.experiment_of("swin_smt+num_experts=32", options, class_map.V2)
    with pytest.raises(UserError, match="follows \\+ in --models"):
        trials.experiment_of("swin_smt+float64", options, class_map.V2)


def test_points_of_the_study_are_names():
    assert moe_study.name_of("0") == "swin_unetr"
    assert (
        moe_study.name_of("4x2+fused")
        == "swin_smt+num_experts=4+num_moe_stages=2+fused"
    )
    with pytest.raises(UserError, match="'4', but a point is 0"):
        moe_study.name_of("4")


def test_experts_are_used_evenly_or_not():
    def run(*importance):
        return {"5": {"stage2/block0": {"importance": importance}}}

    assert moe_study.evenness([run(0.25, 0.25, 0.25, 0.25)]) == {"5": 1.0}
    both = moe_study.evenness([run(1.0, 0.0), run(0.5, 0.5)])
    assert both["5"] == pytest.approx(0.75)


def test_unknown_networks_are_refused():
    with pytest.raises(UserError, match="Did you mean 'swin_unetr'"):
        small_networks.experiment("swin_unet", size="tiny", patch_shape=(32, 32, 64))


@pytest.mark.slow
def test_the_command_compares_two_networks(tmp_path):
    report, picture = tmp_path / "report.json", tmp_path / "picture.png"

    def run(*command, status=0):
        done = subprocess.run(
            [sys.executable, "-m", *command], cwd=ROOT, capture_output=True, text=True
        )
        assert done.returncode == status, done.stderr
        return done.stderr if status else done.stdout

    data = f"--root={tmp_path / 'data'}", f"--workdir={tmp_path / 'runs'}"
    said = run("benchmarks.compare", "--quick", *data, f"--json={report}")
    assert "unetr – nnunet_plain" in said
    again = run("benchmarks.compare", "--quick", *data, "--budget=2")
    assert again == said  # from the runs that are kept
    longer = run("benchmarks.compare", "--quick", *data, "--budget=3", status=2)
    assert "of a run with other settings; give another --workdir" in longer
    found = json.loads(report.read_text())
    assert "processor" in found["machine"] and "jax" in found["versions"]
    assert set(found["headline"]) == {"dice_nnunet_plain", "dice_unetr"}
    assert all(row["steps"] == 2 for row in found["rows"])
    low, high = found["rows"][1]["difference_interval"]["overall"]
    assert low <= found["rows"][1]["difference"]["overall"] <= high
    measured = f"--measured={ROOT / 'benchmarks/results/networks_cpu.json'}"
    run("benchmarks.table", measured, f"--trained={report}", f"--plot={picture}")
    assert picture.stat().st_size > 0


@pytest.mark.slow
def test_the_study_of_experts_trains_and_tells_what_they_do(tmp_path):
    file, picture = tmp_path / "found.json", tmp_path / "picture.png"
    command = [sys.executable, "-m", "benchmarks.moe_study", "--quick", "--points=2x3"]
    command += [f"--root={tmp_path / 'data'}", f"--workdir={tmp_path / 'runs'}"]
    command += [f"--json={file}", f"--plot={picture}"]
    subprocess.run(command, cwd=ROOT, check=True)
    (row,) = json.loads(file.read_text())["rows"]
    assert row["point"] == "2x3" and row["steps"] == 2
    (experts,) = row["experts"]
    assert list(experts) == ["1", "2"]  # half-way and at the end
    for blocks in experts.values():
        assert len(blocks) == 6
        for block in blocks.values():
            assert sum(block["importance"]) == pytest.approx(1, abs=1e-5)
            assert sum(block["load"]) == pytest.approx(1)
            assert 0 <= block["combine_entropy"] <= 1 + 1e-6
    assert picture.stat().st_size > 0
    command.append("--seeds=3")
    command[command.index("--points=2x3")] = "--points=2y3"
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and "but a point is 0" in done.stderr
