import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import nibabel as nib
import numpy as np
import pytest
from absl import flags

import evaluate
from swinsmt_jax.checks import UserError
from swinsmt_jax.config import from_config_dict
from swinsmt_jax.evaluation.run import SurfaceRule

ROOT = Path(evaluate.__file__).parent
FILES = ["overview.png", "per_case.csv", "per_class.csv", "report.html", "results.json"]


def by_brightness(levels, windows):
    """Label k where the HU are nearest to -1000 + 10 k."""
    hu = windows * 2048 - 1024
    return -jnp.abs(hu + 1000 - 10 * levels)


@pytest.fixture
def dataset(tmp_path, rng):
    """Two test cases of 117 structures, the second without the spleen."""
    root = tmp_path / "data"
    rows = ["image_id;split"]
    for name in ("s0001", "s0002"):
        labels = rng.integers(0, 118, (30, 36, 28)).astype(np.uint8)
        if name == "s0002":
            labels[labels == 1] = 0
        folder = root / name
        folder.mkdir(parents=True)
        affine = np.diag([3.0, 3.0, 3.0, 1.0])
        hu = (labels * 10.0 - 1000).astype(np.int16)
        nib.save(nib.Nifti1Image(hu, affine), folder / "ct.nii.gz")
        nib.save(nib.Nifti1Image(labels, affine), folder / "segmentations.nii.gz")
        rows.append(f"{name};test")
    (root / "meta.csv").write_text("\n".join(rows) + "\n")
    return root


@pytest.fixture
def trained(monkeypatch, dataset):
    """A checkpoint whose network names every voxel rightly."""
    config = from_config_dict(
        {
            "model": {
                "name": "swin_unetr",
                "in_channels": 1,
                "out_channels": 118,
                "feature_size": 12,
            },
            "data": {
                "root": str(dataset),
                "patch_shape": (32, 32, 32),
                "batch_size": 1,
            },
            "optimizer": {"learning_rate": 1e-3},
            "training": {"num_steps": 1},
        }
    )
    model = jax.tree_util.Partial(by_brightness, jnp.arange(118.0))
    asked = []

    def load_model(workdir, *, step=None):
        asked.append((workdir, step))
        return config, model, {"step": 40, "metrics": {}}

    monkeypatch.setattr(evaluate, "load_model", load_model)
    return asked


def parse(*arguments):
    values = flags.FlagValues()
    evaluate.define_flags(values)
    values(["evaluate.py", *arguments])
    return values


def test_a_perfect_network_gets_a_perfect_table(trained, tmp_path):
    table = evaluate.evaluate(parse(f"--workdir={tmp_path}", "--step=40"))
    assert trained == [(tmp_path, 40)]
    header = "organs vertebrae muscles ribs vessels overall"
    assert header.split() == table.splitlines()[2].split()[2:]
    assert table.splitlines()[4].split() == [">", "over_classes", *["100.00"] * 6]
    assert "2 cases of the split 'test', checkpoint of step 40" in table
    output = tmp_path / "eval_test"
    assert sorted(p.name for p in output.iterdir()) == FILES
    content = json.loads((output / "results.json").read_text())
    assert content["dice"]["overall"] == 1 and content["step"] == 40
    assert content["cases"]["s0002"]["dice"]["spleen"] is None
    assert content["window"] == [32, 32, 32]
    assert content["surface_dice"]["overall"] == 1
    assert content["cases"]["s0002"]["surface_dice"]["spleen"] is None
    assert "overall 85.09" in table
    assert "surface Dice" in table and "a scan (median" in table
    page = (output / "report.html").read_text()
    assert "spleen" in page and page.count("data:image/png") == 2


def test_flags_reach_what_they_name(trained, dataset, tmp_path):
    groups = tmp_path / "groups.json"
    groups.write_text('{"upper abdomen": ["spleen", "liver", 7]}')
    output = tmp_path / "elsewhere"
    dataset.rename(tmp_path / "moved")
    options = parse(
        f"--workdir={tmp_path}",
        f"--data_root={tmp_path / 'moved'}",
        f"--output={output}",
        f"--groups={groups}",
        "--limit=1",
        "--average=over_pairs",
        "--overlap=0.25",
        "--blend=constant",
        "--window_batch=2",
        "--step=latest",
        "--surface_tolerance=0",
    )
    table = evaluate.evaluate(options)
    assert trained == [(tmp_path, "latest")]
    assert "85.09" not in table and "upper abdomen" in table and "> over_pairs" in table
    content = json.loads((output / "results.json").read_text())
    assert list(content["cases"]) == ["s0001"]
    assert content["groups"] == {"upper abdomen": ["spleen", "liver", "pancreas"]}
    assert (content["overlap"], content["blend"]) == (0.25, "constant")
    assert content["surface_dice"] is None and "surface Dice" not in table


@pytest.mark.parametrize(
    "flag, words",
    [
        ("--split=val", "lists no case of the split 'val'"),
        ("--data_root=nowhere", "nowhere does not exist"),
        ("--groups=nothing.json", "nothing.json does not exist"),
        ("--overlap=1.5", "overlap is 1.5"),
        ("--window_batch=0", "window_batch is 0"),
        ("--limit=-1", "limit is -1"),
    ],
)
def test_bad_flags_are_user_errors(trained, tmp_path, flag, words):
    with pytest.raises(UserError, match=words):
        evaluate.evaluate(parse(f"--workdir={tmp_path}", flag))


def test_a_network_of_other_classes_is_refused(trained, tmp_path, monkeypatch):
    config, model, info = evaluate.load_model(tmp_path)
    small = dataclasses.replace(config.model, out_channels=5)
    small = dataclasses.replace(config, model=small)
    monkeypatch.setattr(evaluate, "load_model", lambda *_, step: (small, model, info))
    with pytest.raises(UserError, match=r"holds label 117.*out_channels is 5"):
        evaluate.evaluate(parse(f"--workdir={tmp_path}"))


def test_an_output_that_is_a_file_is_refused(trained, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be made"):
        evaluate.evaluate(parse(f"--workdir={tmp_path}", f"--output={tmp_path}/file"))


def test_user_errors_end_the_script_in_one_line(tmp_path):
    command = [sys.executable, "evaluate.py", f"--workdir={tmp_path / 'missing'}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2, done.stderr
    line = done.stderr.strip().splitlines()[-1]
    assert line.startswith("evaluate.py: ") and "missing" in line
    assert "Traceback" not in done.stderr


def test_the_protocol_of_totalsegmentator(dataset):
    assert evaluate.scoring(parse("--protocol=totalseg")) == {
        "rule": "over_classes",
        "surface_rule": SurfaceRule(3.0, (1.5, 1.5, 1.5)),
    }
    with pytest.raises(UserError, match="--average=over_pairs was given too"):
        evaluate.scoring(parse("--protocol=totalseg", "--average=over_pairs"))
    assert evaluate.scoring(parse("--surface_tolerance=0"))["surface_rule"] is None


def evaluate_files(*arguments):
    command = [sys.executable, "evaluate.py", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


def test_predictions_in_files_are_evaluated(dataset, tmp_path):
    folder, output = tmp_path / "out", tmp_path / "results"
    folder.mkdir()
    for name in ("s0001", "s0002"):  # the second one flipped in the file, not in space
        image = nib.load(dataset / name / "segmentations.nii.gz")
        image = (
            image if name == "s0001" else image.as_reoriented([[0, -1], [1, 1], [2, 1]])
        )
        nib.save(image, folder / f"{name}.nii.gz")
    flags = f"--predictions={folder}", f"--data_root={dataset}", f"--output={output}"
    done = evaluate_files(*flags)
    assert done.returncode == 0, done.stderr
    assert "2 cases of the split 'test', predictions in" in done.stdout
    assert sorted(p.name for p in output.iterdir()) == FILES
    found = json.loads((output / "results.json").read_text())
    assert found["dice"]["overall"] == 1 and found["false_positives"] == 0
    (folder / "s0002.nii.gz").unlink()
    done = evaluate_files(*flags)
    assert done.returncode == 2 and "has no prediction of case 's0002'" in done.stderr
    done = evaluate_files(f"--compare={output},{output}")
    assert done.returncode == 0 and "Wilcoxon" in done.stdout
    done = evaluate_files(f"--predictions={folder}")
    assert done.returncode == 2 and "needs --data_root" in done.stderr
