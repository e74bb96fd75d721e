import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import nibabel as nib
import numpy as np
import pytest
import surface_distance
from absl import flags

from swinsmt_jax import labels
from swinsmt_jax.checks import UserError
from swinsmt_jax.commands import evaluate
from swinsmt_jax.config import from_config_dict
from swinsmt_jax.evaluation import predictions
from swinsmt_jax.evaluation.evaluate_split import evaluate_split
from swinsmt_jax.evaluation.looks import Looks
from swinsmt_jax.evaluation.predictions import evaluate_predictions
from swinsmt_jax.evaluation.surface import SurfaceRule
from swinsmt_jax.inference.outputs import OutputOptions
from swinsmt_jax.inference.scans import find_scans, segment_scans
from swinsmt_jax.inference.segmenter import Segmenter, predict_fn
from swinsmt_jax.runtime.processes import SomeFailedError

ROOT = Path(__file__).parents[1]
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
    assert trained == [(tmp_path, "40")]
    header = "organs vertebrae muscles ribs vessels overall"
    lines = table.splitlines()
    (at,) = [i for i, line in enumerate(lines) if line.startswith("Dice (%)")]
    assert header.split() == lines[at].split()[2:]
    assert lines[at + 2].split() == [">", "over_classes", *["100.00"] * 6]
    assert "2 cases of the split 'test', checkpoint of step 40" in table
    output = tmp_path / "eval_test"
    assert sorted(p.name for p in output.iterdir()) == FILES
    content = json.loads((output / "results.json").read_text())
    assert content["dice"]["overall"] == 1 and content["step"] == 40
    assert content["cases"]["s0002"]["dice"]["spleen"] is None
    assert content["window"] == [32, 32, 32]
    assert content["surface_dice"]["overall"] == 1
    assert content["cases"]["s0002"]["surface_dice"]["spleen"] is None
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
        "metrics": None,
        "surface_rule": SurfaceRule(3.0, (1.5, 1.5, 1.5), slack=0.0),
        "protocol": "totalseg",
        "looks": Looks(),
    }
    with pytest.raises(UserError, match="--average=over_pairs was given too"):
        evaluate.scoring(parse("--protocol=totalseg", "--average=over_pairs"))
    assert evaluate.scoring(parse("--surface_tolerance=0"))["surface_rule"] is None


@pytest.mark.parametrize(
    "arguments, words",
    [
        ("--metrics=dice,nsd --surface_tolerance=0", "is 0 mm.*asks for surface_dice"),
        ("--metrics=dice,hd59", "metrics is 'hd59'.*Did you mean 'hd95'"),
        ("--metrics=nsd", "must have 'dice'"),
        ("--protocol=mona", "--protocol is 'mona'.*Did you mean 'monai'"),
        ("--protocol=nnunet --metrics=dice,hd95", "'hd95', which nnU-Net 2.8.1 does"),
        ("--protocol=monai --metrics=dice,volume", "gives dice, surface_dice, hd95"),
        ("--protocol=monai --average=over_pairs", "sets --average=over_cases"),
        ("--protocol=totalseg --surface_tolerance=2", "sets --surface_tolerance=3.0"),
        ("--protocol=medpy --cut_faces=ignore", "sets --cut_faces=count"),
    ],
)
def test_what_cannot_be_measured_is_refused_before_work_begins(arguments, words):
    with pytest.raises(UserError, match=words):
        evaluate.scoring(parse(*arguments.split()))


def evaluate_files(*arguments):
    command = [sys.executable, "evaluate.py", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


@pytest.mark.parametrize("workers", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_predictions_in_files_are_evaluated(dataset, tmp_path, workers):
    folder, output = tmp_path / "out", tmp_path / "results"
    folder.mkdir()
    for name in ("s0001", "s0002"):  # the second one flipped in the file, not in space
        image = nib.load(dataset / name / "segmentations.nii.gz")
        image = (
            image if name == "s0001" else image.as_reoriented([[0, -1], [1, 1], [2, 1]])
        )
        nib.save(image, folder / f"{name}.nii.gz")
    done = evaluate_files(
        f"--predictions={folder}",
        f"--data_root={dataset}",
        f"--output={output}",
        "--surface_tolerance=0",
        f"--workers={workers}",
    )
    assert done.returncode == 0, done.stderr
    assert "2 cases of the split 'test', predictions in" in done.stdout
    assert sorted(p.name for p in output.iterdir()) == FILES
    found = json.loads((output / "results.json").read_text())
    assert found["dice"]["overall"] == 1 and found["false_positives"] == 0
    assert [case["seconds"] for case in found["cases"].values()] == [None, None]
    for file in ("per_case.csv", "report.html"):
        assert "nan" not in (output / file).read_text()
    assert not list(output.rglob("cases*"))
    (folder / "s0002.nii.gz").unlink()
    with pytest.raises(UserError, match="has no prediction of case 's0002'"):
        evaluated(folder, dataset, output)


def test_predictions_may_be_named_after_the_images(tmp_path):
    """As `predict.py` names those of nnU-Net's imagesTs."""
    root, folder = tmp_path / "raw", tmp_path / "out"
    hu = np.full((6, 7, 8), -1000, np.int16)
    hu[2:4, 2:4, 2:4] = 100
    truth = (hu > 0).astype(np.uint8)
    for place, array in (
        (root / "imagesTr/a_0000.nii.gz", hu),
        (root / "labelsTr/a.nii.gz", truth),
        (root / "imagesTs/b_0000.nii.gz", hu),
        (root / "labelsTs/b.nii.gz", truth),
        (root / "imagesTs/c_0000.nii.gz", hu),
        (root / "labelsTs/c.nii.gz", truth),
        (folder / "b_0000.nii.gz", truth),
        (folder / "c_0000/liver.nii.gz", truth),
    ):
        place.parent.mkdir(parents=True, exist_ok=True)
        nib.save(nib.Nifti1Image(array, np.eye(4)), place)
    names = {"background": 0, "liver": 1}
    content = {"channel_names": {"0": "CT"}, "labels": names}
    (root / "dataset.json").write_text(json.dumps(content))
    found = evaluated(folder, root, tmp_path / "results")
    assert found["dice"]["overall"] == 1 and set(found["cases"]) == {"b", "c"}


def call(monkeypatch, *arguments):
    """Run the script in this process."""
    monkeypatch.setattr(evaluate.startup, "start", evaluate.startup.only_flags)
    values = flags.FlagValues()
    evaluate.define_flags(values)
    rest = values(["evaluate.py", *arguments])
    monkeypatch.setattr(evaluate.flags, "FLAGS", values)
    evaluate.main(rest)


@pytest.mark.parametrize("way", ["--workdir=nowhere", "--predictions=nowhere"])
def test_an_unknown_protocol_is_refused_in_one_line(way):
    done = subprocess.run(
        [sys.executable, "evaluate.py", way, "--protocol=totalsek"]
        + ["--data_root=nowhere", "--output=nowhere"],
        cwd=Path(__file__).parents[1],
        capture_output=True,
        text=True,
    )
    assert done.returncode != 0
    (line,) = done.stderr.strip().splitlines()
    assert "--protocol is 'totalsek'" in line and "'totalseg'" in line


def test_predictions_need_the_truth(monkeypatch):
    with pytest.raises(UserError, match="needs --data_root"):
        call(monkeypatch, "--predictions=out")


@pytest.mark.parametrize(
    "words, found",
    [
        (["a,b"], ["a", "b"]),
        (["a", "b"], ["a", "b"]),
        (["a"], None),
        (["a,b", "c"], None),
    ],
)
def test_two_folders_are_compared_in_either_form(words, found, monkeypatch):
    seen = []
    compare = lambda *folders, split: seen.extend(folders) or []  # noqa: E731
    monkeypatch.setattr(evaluate.compare, "compare", compare)
    if found is None:
        with pytest.raises(UserError, match="--compare takes two folders"):
            call(monkeypatch, "--compare", *words)
    else:
        call(monkeypatch, "--split=val", "--compare", *words)
        assert seen == found


def noisy(dataset, rng, folder):
    """Write predictions of which a third is another structure, or none."""
    folder.mkdir()
    for name in ("s0001", "s0002"):
        image = nib.load(dataset / name / "segmentations.nii.gz")
        label = np.asarray(image.dataobj)
        other = rng.integers(0, 118, label.shape)
        label = np.where(rng.random(label.shape) < 0.3, other, label).astype(np.uint8)
        label[label == 5] = 0  # missed altogether
        nib.save(nib.Nifti1Image(label, image.affine), folder / f"{name}.nii.gz")
    return folder


def evaluated(folder, dataset, output, **options):
    evaluate_predictions(
        folder,
        root=dataset,
        split="test",
        output=output,
        workers=1,
        **{"rule": "over_classes", "surface_rule": None} | options,
    )
    return json.loads((output / "results.json").read_text())


def test_scores_are_kept_until_all_cases_have_some(dataset, tmp_path, rng, monkeypatch):
    folder, output = noisy(dataset, rng, tmp_path / "files"), tmp_path / "results"
    whole = evaluated(folder, dataset, tmp_path / "whole")
    scored, score = [], predictions.score
    count = lambda scan, *a, **b: scored.append(scan.name) or score(scan, *a, **b)  # noqa: E731
    monkeypatch.setattr(predictions, "score", count)
    file = folder / "s0002.nii.gz"
    good = file.read_bytes()
    file.write_bytes(good[:2000])
    with pytest.raises(SomeFailedError, match="1 of 2 cases .* s0002: .*truncated"):
        evaluated(folder, dataset, output)
    assert [f.name for f in output.iterdir()] == ["cases"] and scored == ["s0001"]
    with pytest.raises(SomeFailedError):  # what was scored is of no use elsewhere
        evaluated(folder, dataset, output, surface_rule=SurfaceRule())
    assert scored == ["s0001", "s0001"]
    file.write_bytes(good)
    assert evaluated(folder, dataset, output) == whole | {"data_root": str(dataset)}
    assert sorted(p.name for p in output.iterdir()) == FILES
    del scored[:]
    file.write_bytes(good[:2000])
    with pytest.raises(SomeFailedError):
        evaluated(folder, dataset, output)
    file.write_bytes(good)
    os.utime(folder / "s0001.nii.gz", (0, 0))  # as if it had been replaced
    evaluated(folder, dataset, output)
    assert scored == ["s0001", "s0001", "s0002"]


def test_a_folder_of_masks_is_read_as_a_label_file(dataset, tmp_path, rng, caplog):
    folder = noisy(dataset, rng, tmp_path / "files")
    expected = evaluated(folder, dataset, tmp_path / "a")
    for file in folder.iterdir():
        image = nib.load(file)
        masks = tmp_path / "masks" / file.name.removesuffix(".nii.gz")
        masks.mkdir(parents=True)
        (masks / "statistics.json").write_text("{}")  # as TotalSegmentator --statistics
        for number, name in enumerate(labels.CLASS_NAMES):
            mask = (np.asarray(image.dataobj) == number).astype(np.uint8)
            if mask.any() and number:
                nib.save(nib.Nifti1Image(mask, image.affine), masks / f"{name}.nii.gz")
    found = evaluated(tmp_path / "masks", dataset, tmp_path / "b")
    assert found["cases"] == expected["cases"]
    assert "has no mask of 1 classes, which count as predicted nowhere" in caplog.text
    (masks / "aorta.nii.gz").rename(masks / "aota.nii.gz")
    with pytest.raises(UserError, match="aota.nii.gz is a mask of none .* 'aorta'"):
        evaluated(tmp_path / "masks", dataset, tmp_path / "c")


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_the_protocol_gives_what_totalsegmentators_script_would(dataset, tmp_path, rng):
    """Case by case and class by class, as their resources/evaluate.py counts."""
    folder = noisy(dataset, rng, tmp_path / "files")
    rules = evaluate.scoring(parse("--protocol=totalseg"))
    found = evaluated(folder, dataset, tmp_path / "results", **rules)
    chosen, dice, surfaces = (1, 2, 5, 60, 117), {}, {}
    for case in found["cases"]:
        truth, predicted = (
            np.asarray(nib.load(file).dataobj)
            for file in (
                dataset / case / "segmentations.nii.gz",
                folder / f"{case}.nii.gz",
            )
        )
        for k in range(1, 118):
            a, b = truth == k, predicted == k
            if not a.any():
                continue
            dice.setdefault(k, []).append(
                2 * np.sum(a & b) / (a.sum() + b.sum()) if b.any() else 0
            )
            if k in chosen:
                value = 0.0
                if b.any():
                    distances = surface_distance.compute_surface_distances(
                        a, b, [1.5, 1.5, 1.5]
                    )
                    value = surface_distance.compute_surface_dice_at_tolerance(
                        distances, 3.0
                    )
                surfaces[case, k] = value
    overall = np.mean([np.mean(values) for values in dice.values()])
    assert found["dice"]["overall"] == pytest.approx(overall, abs=1e-6)
    assert len(surfaces) == 9  # the second case has no spleen
    for (case, k), value in surfaces.items():
        own = found["cases"][case]["surface_dice"][labels.CLASS_NAMES[k]]
        assert own == pytest.approx(value, abs=1e-6)


def test_files_are_evaluated_as_the_network_that_made_them(trained, dataset, tmp_path):
    """At a spacing that is not the scans', where labels come back from another grid."""
    config, model, _ = evaluate.load_model(tmp_path)
    config = dataclasses.replace(
        config, data=dataclasses.replace(config.data, spacing=4.0)
    )
    rules = {"rule": "over_pairs", "surface_rule": SurfaceRule()}
    options = {"split": "test", "groups": labels.GROUPS, "output": tmp_path / "direct"}
    options["limit"] = 1
    evaluate_split(model, config, **options, **rules)
    expected = json.loads((tmp_path / "direct" / "results.json").read_text())
    segmenter = Segmenter(config, predict_fn(model), 1)
    scans = find_scans([dataset / "s0001"])
    segment_scans(segmenter, scans, tmp_path / "out", OutputOptions())
    output = tmp_path / "files"
    found = evaluated(tmp_path / "out", dataset, output, limit=1, **rules)
    for key in ("dice", "surface_dice", "dice_by_average", "false_positives"):
        assert found[key] == expected[key]
    assert 0 < found["dice"]["overall"] < 1
    for name, case in found["cases"].items():
        assert case | {"seconds": 0} == expected["cases"][name] | {"seconds": 0}


def test_any_id_of_a_case_is_only_text(dataset, tmp_path):
    odd = "s1 <b>&$x^$"
    (dataset / "s0001").rename(dataset / odd)
    meta = (dataset / "meta.csv").read_text().replace("s0001;", f'"{odd}";')
    (dataset / "meta.csv").write_text(meta)
    folder = tmp_path / "out"
    folder.mkdir()
    for name in (odd, "s0002"):
        image = nib.load(dataset / name / "segmentations.nii.gz")
        nib.save(image, folder / f"{name}.nii.gz")
    assert odd in evaluated(folder, dataset, tmp_path / "results")["cases"]
    page = (tmp_path / "results" / "report.html").read_text()
    assert "<b>" not in page and page.count("s1 &lt;b&gt;&amp;$x^$") >= 2


def test_what_is_doubtful_about_a_scan_stands_in_the_report(trained, dataset, tmp_path):
    file = dataset / "s0001" / "ct.nii.gz"
    image = nib.load(file)
    array, affine = np.asarray(image.dataobj), image.affine.copy()
    moved = nib.Nifti1Image(array, affine)
    moved.set_sform(affine, 1)
    affine[0, 3] += 5
    moved.set_qform(affine, 1)
    nib.save(moved, file)
    table = evaluate.evaluate(parse(f"--workdir={tmp_path}"))
    (line,) = [x for x in table.splitlines() if x.startswith("To check: ")]
    assert "s0001" in line and "sform and qform disagree by up to 5.0 mm" in line
    output = tmp_path / "eval_test"
    found = json.loads((output / "results.json").read_text())["cases"]
    assert [line] == [f"To check: {note}" for note in found["s0001"]["notes"]]
    assert found["s0002"]["notes"] == []
    assert "qform disagree" in (output / "report.html").read_text()
