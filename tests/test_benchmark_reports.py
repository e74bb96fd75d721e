"""Every benchmark's command line and what it reports."""

import json
import subprocess
import sys
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from absl import flags

import benchmarks
from benchmarks import (
    conditioning,
    gpu_check,
    gpu_parts,
    inference,
    largest_batch,
    loss,
    model,
    model_worker,
    moe_scaling,
    parity,
    routing_maps,
    scaling,
    soft_moe,
    trials,
)
from benchmarks.model_worker import Job
from swinsmt_jax.checks import UserError
from swinsmt_jax.config import DataConfig
from swinsmt_jax.data import preprocess

ROOT = Path(__file__).resolve().parents[1]


def run(name, *arguments):
    """Run a benchmark; return the finished process."""
    command = [sys.executable, "-m", f"benchmarks.{name}", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


def test_a_report_says_where_it_comes_from():
    found = benchmarks.report({"a": 1.0}, rows=[])
    assert set(found) == {"headline", "rows", "machine", "versions", "command"}
    assert found["machine"]["processor"] not in ("", "x86_64")
    assert found["machine"]["cores"] >= 1 and found["machine"]["devices"] >= 1
    assert {"python", "jax", "jaxlib", "flax"} <= set(found["versions"])
    json.dumps(found)


def test_the_loss_reports_its_figures(tmp_path):
    file = tmp_path / "loss.json"
    done = run("model", "--loss", "--quick", "--classes=3", f"--json={file}")
    assert done.returncode == 0, done.stderr
    found = json.loads(file.read_text())
    assert {"forward_ms", "gradient_mib"} <= set(found["headline"])
    assert found["headline"]["features_gradient_ratio_to_head_and_loss"] > 0
    assert len(found["rows"]) == 5 and "processor" in found["machine"]
    assert found["command"].startswith("python -m benchmarks.model --loss --quick")


def test_parity_without_goldens_says_what_to_do(tmp_path):
    with pytest.raises(UserError, match="set --goldens to the folder"):
        parity.all_figures(tmp_path, quick=True)


def test_parity_reports_the_largest_deviation_of_each_kind():
    figures = [
        parity.Figure("a", "hidden state 0, absolute", 1e-5, 1e-4),
        parity.Figure("a", "hidden state 1, absolute", 3e-5, 1e-4),
        parity.Figure("sliding", "gaussian", 2.0, 1e-5),
        parity.Figure("b", "logits, absolute", float("nan"), 1e-4),
    ]
    found = parity.headline(figures[:3])
    assert found["hidden_state_absolute"] == 3e-5
    assert found["sliding_gaussian"] == 2.0
    assert found["figures"] == 3 and found["beyond"] == 1
    assert parity.headline(figures)["beyond"] == 2


def test_conditioning_leaves_out_norms_that_are_rounding():
    theirs = {"a": 1.0, "b": 1e-3, "bias": 1e-9}
    found = conditioning.compare({"a": 1.0005, "b": 1.002e-3, "bias": 2e-9}, theirs)
    assert found["parameter"] == "b" and found["beyond"] == 1
    assert found["plain"] == pytest.approx(2e-3)
    assert found["guarded"] == pytest.approx(1e-3)


def test_meshes_are_flat_in_the_headlines():
    sent = {"all-reduce": {"count": 2, "bytes": 30}}
    row = {"data": 4, "expert": 2, "collectives": sent}
    row |= {"expert_bytes_per_device": 5, "rest_bytes_per_device": 7}
    found = scaling.headline([row | {"state_gb": 1.0, "temporaries_gb": 2.0}], [])
    assert found["all_reduce_bytes_4x2"] == 30 and found["all_gather_bytes_4x2"] == 0
    assert found["expert_bytes_per_device_4x2"] == 5
    assert found["state_gb_4x2"] == 1.0 and found["temporaries_gb_4x2"] == 2.0


def moe_row(experts, **more):
    row = {
        "experts": experts,
        "moe_stages": 3,
        "side": 64,
        "parameters": 10 * experts,
        "forward_flops": 2e9,
        "held_bytes": {1: 3e9},
        "gradient_gb": 1.5,
        "gradient_seconds": None,
        "meshes": [],
    }
    return row | more


def test_the_study_of_experts_reports_costs_and_the_largest(tmp_path):
    mesh = {"data": 2, "expert": 1, "step_gb": 1.0, "step_seconds": 4.0}
    rows = [moe_row(4), moe_row(8, meshes=[mesh])]
    found = moe_scaling.headline(rows)
    assert found["parameters_4_3"] == 40 and found["largest_parameters"] == 80
    assert found["forward_gflop_8_3"] == 2 and found["gradient_gb_8_3"] == 1.5
    assert found["step_s_8_3_2x1"] == 4.0 and "gradient_s_8_3" not in found
    assert "2x1 1.00 GB 4.00 s" in moe_scaling.line(rows[1])
    moe_scaling.plot(rows, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 0


def test_a_quick_run_of_soft_moe_has_what_the_headline_needs():
    plan = soft_moe.plan(quick=True, on_gpu=False)
    rows = [
        soft_moe.Row(tokens, form, what, 0.5, 2.0 if form == "dense" else 1.0)
        for tokens, what, form, _ in plan
    ]
    found = soft_moe.headline(rows)
    assert found["grad_temp_gb_32768"] == found["grad_temp_gb_110592"] == 0.5
    assert found["forward_ratio_32768"] == 0.5
    assert {form for *_, form, _ in soft_moe.plan(quick=True, on_gpu=True)} > {"cudnn"}


def test_a_form_that_fails_is_a_row(monkeypatch):
    sizes = {"channels": 8, "experts": 4, "limit_gb": 1.0, "run": True}
    row = soft_moe.measure(64, "forward", "streaming", **sizes)
    assert row.error is None and row.seconds > 0

    def fails(*arguments, **options):
        raise RuntimeError("no kernel")

    monkeypatch.setattr(soft_moe, "seconds_of", fails)
    row = soft_moe.measure(64, "forward", "streaming", **sizes)
    assert row.error == "no kernel" and row.temporaries_gb is not None
    assert "no kernel" in soft_moe.line(row)


JOB = Job("torch", "swin_smt_e4", 192, "forward")


def test_what_is_known_not_to_fit_is_skipped(monkeypatch):
    monkeypatch.setattr(model_worker, "memory_limit_gb", lambda: 24.0)
    assert "needs more than 147 GB" in model.start(JOB)["error"]
    assert model_worker.shortage(Job("torch", "swin_smt_e4", 128, "forward")) is None
    assert model_worker.shortage(Job("torch", "swin_unetr_b", 192, "forward")) is None


def test_rates_follow_from_operations(monkeypatch):
    monkeypatch.setattr(model, "operations", lambda job: 4e12)
    monkeypatch.setattr(model, "peak", lambda: 8e12)
    row = {"side": 64, "jax": {"seconds": 2.0}, "torch": {"error": "none"}}
    model.add_rates(row, Job("jax", "swin_smt_e4", 64, "step", batch=3))
    found = row["jax"]
    assert found["patches_per_s"] == 1.5 and found["tflop_per_s"] == 2.0
    assert found["utilisation"] == 0.25 and row["torch"] == {"error": "none"}


@pytest.mark.parametrize("most", [1, 3, 5, 64])
def test_the_largest_batch_is_found(monkeypatch, most):
    def start(job):
        if job.batch > most:
            return {"error": "out of memory"}
        return {"seconds": [1.0]}

    monkeypatch.setattr(largest_batch, "start", start)
    found = largest_batch.largest_batch(JOB)
    assert found["batch"] == most and found["patches_per_s"] == most
    assert largest_batch.headline({"torch": {"batch": 2}, "jax": found})["ratio"] == (
        most / 2
    )
    quick = largest_batch.largest_batch(JOB, quick=True)["batch"]
    assert quick == 1 << most.bit_length() - 1


def test_the_headline_has_the_usual_form_of_a_network():
    row = {"network": "swin_smt_e4", "side": 128, "what": "forward"}
    usual, *others = [
        row | {"dtype": dtype, "remat": remat, "time_ratio": ratio}
        for ratio, (dtype, remat) in enumerate(
            [("float32", True), ("bfloat16", True), ("float32", False)]
        )
    ]
    for rows in ([usual, *others], [*others, usual]):
        assert model.headline(rows)["fwd_128_time_ratio"] == 0


def test_parts_of_the_rows_are_chosen_and_added(tmp_path, monkeypatch):
    class Options:
        networks, sides, what = ["swin_smt_e4"], ["64"], []

    rows = model.chosen(model.ROWS, Options)
    assert {row[:2] for row in rows} == {("swin_smt_e4", 64)} and len(rows) == 3
    Options.sides = ["63"]
    with pytest.raises(UserError, match="no row has"):
        model.chosen(model.ROWS, Options)
    about = {"processor": "p", "device": "cpu", "threads": 2}
    again = {"network": "swin_smt_e4", "side": 64, "what": "step"}
    again |= {"dtype": "float32", "remat": True}
    others = {"network": "a", "dtype": "bfloat16", "remat": False}
    kept = [again | {name: value} for name, value in others.items()]
    file = tmp_path / "model.json"
    file.write_text(json.dumps({"machine": about, "rows": [*kept, again]}))
    job = Job("jax", "swin_smt_e4", 64, "step", remat=True)
    found = model.earlier(str(file), about, [job])
    assert found["rows"] == kept
    with pytest.raises(UserError, match="write to another file"):
        model.earlier(str(file), about | {"threads": 4}, [])


def test_a_quick_comparison_keeps_what_is_given():
    values = flags.FlagValues()
    for name in trials.QUICK:
        flags.DEFINE_string(name, None, "of the command", flag_values=values)
    values(["compare", "--budget=7"])
    trials.set_quick(values)
    assert values.budget == "7" and values.size == "tiny"
    assert values.root == "data/compare_phantoms_quick"


def test_experts_that_nothing_looks_at_are_counted():
    shares = {"ribs": [0.5, 0.5, 0.0], "organs": [0.99, 0.0, 0.0]}
    found = routing_maps.headline([{"block": "stage2/block0", "shares": shares}])
    assert found == {"experts_without_share_stage2_block0": 1}


def test_routing_is_drawn_of_stores_and_described_data_as_of_the_scans(tmp_path):
    """A dataset by nnU-Net's layout of two classes, and a store made of it."""
    hu, root = np.full((40, 36, 34), -1000, np.int16), tmp_path / "data"
    hu[4:36, 4:32, 4:30] = 40
    for folder, array in (("imagesTr", hu), ("labelsTr", np.uint8(hu > 0))):
        (root / folder).mkdir(parents=True)
        name = "a_0000.nii.gz" if folder == "imagesTr" else "a.nii.gz"
        image = nib.Nifti1Image(array, np.diag([-2, -2, 2, 1]))
        nib.save(image, root / folder / name)
    about = {"channel_names": {"0": "CT"}, "labels": {"background": 0, "nose": 1}}
    about |= {"numTraining": 1, "file_ending": ".nii.gz"}
    (root / "dataset.json").write_text(json.dumps(about))
    assert not preprocess.preprocess(root, tmp_path / "store")
    found = []
    for place in (root, tmp_path / "store"):
        data = DataConfig(str(place), (32,) * 3, batch_size=1, classes=("nose",))
        sample, groups = routing_maps.case_of(data, split="train", name=None)
        assert {name: list(ids) for name, ids in groups.items()} == {"structures": [1]}
        found.append(sample)
    assert found[0].image.max() == pytest.approx(1064 / 2048)
    np.testing.assert_array_equal(found[0].image, found[1].image)
    np.testing.assert_array_equal(found[0].label, found[1].label)
    routing_maps.draw(tmp_path / "a.png", sample, sample.label + 1, 4, groups)
    assert (tmp_path / "a.png").stat().st_size > 0


def test_whole_scans_are_measured_as_they_are():
    shape = (80, 80, 112)
    options = {"side": 32, "classes": 16, "accum_dtype": "float32"}
    labels, peak, _ = inference.measure(shape, **options)
    nothing, early, _ = inference.measure(shape, until_peak=True, **options)
    assert labels.shape == shape and nothing is None
    assert early == pytest.approx(peak, rel=0.05)
    grid = inference.other_grid(shape)
    labels, _, _ = inference.measure(shape, positions=grid, **options)
    assert labels.shape == (64, 64, 89)
    assert inference.labels_identical(side=8, classes=4)
    assert inference.differing_on_device(side=8, classes=4) < 1e-3


def test_the_loss_forms_agree(rng):
    logits = rng.normal(size=(1, 4, 4, 4, 5)).astype(np.float32)
    labels = rng.integers(0, 5, (1, 4, 4, 4)).astype(np.uint8)
    ours = float(loss.dice_cross_entropy(logits, labels))
    for form in (loss.compared, loss.one_hot):
        assert float(form(logits, labels)) == pytest.approx(ours, rel=1e-5)


def test_every_part_of_the_gpu_check_has_a_command():
    assert set(gpu_check.PARTS) == {*gpu_parts.PARTS, *gpu_check.COMMANDS}


@pytest.mark.slow
@pytest.mark.parametrize(
    "command",
    [
        ("scaling",),
        ("model", "--roofline"),
        ("finetune",),
        ("remat", "--limits=6"),
    ],
)
def test_quick_runs_end_with_a_report(command, tmp_path):
    file = tmp_path / "report.json"
    done = run(*command, "--quick", f"--json={file}")
    assert done.returncode == 0, done.stderr
    found = json.loads(file.read_text())
    assert found["headline"] and {"machine", "versions", "command"} <= set(found)


@pytest.mark.slow
def test_a_worker_of_dask_that_is_killed_changes_no_file(tmp_path):
    file = tmp_path / "report.json"
    done = run("cluster", "--quick", f"--json={file}")
    assert done.returncode == 0, done.stderr
    found = json.loads(file.read_text())["headline"]
    assert found["preprocess_killed"] == 1 and found["preprocess_equal"] is True
