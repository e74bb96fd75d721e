"""Cases that annotate some classes, or not all voxels: trained on, and scored."""

import json

import jax
import nibabel as nib
import numpy as np
import pytest

from swinsmt_jax.config import from_config_dict
from swinsmt_jax.configs import demo
from swinsmt_jax.data.preprocess import preprocess
from swinsmt_jax.data.sample import Sample
from swinsmt_jax.evaluation import validation
from swinsmt_jax.evaluation.evaluate_split import evaluate_split
from swinsmt_jax.evaluation.metrics import chosen_metrics
from swinsmt_jax.evaluation.predictions import evaluate_predictions
from swinsmt_jax.evaluation.scoring import Evaluation, score
from swinsmt_jax.evaluation.surface import SurfaceRule
from swinsmt_jax.labels import IGNORED
from swinsmt_jax.training import loop
from swinsmt_jax.training.checkpoint import load_model


def scored(label, prediction, *, annotated=None, protocol=None):
    image = np.zeros(label.shape, np.int16)
    scan = Sample(image, label, np.eye(4), "x", annotated=annotated)
    rule = SurfaceRule()
    return score(
        scan,
        prediction,
        seconds=0.0,
        num_classes=4,
        metrics=chosen_metrics(surface_rule=rule, protocol=protocol),
        surface_rule=rule,
    ).result


def pair():
    label = np.zeros((10, 6, 6), np.uint8)
    label[1:4, 1:5, 1:5], label[5:8, 1:5, 1:5] = 1, 2
    prediction = np.roll(label, 1, axis=1)
    prediction[8:, 1:3] = 3  # of which the truth says nothing
    return label, prediction


@pytest.mark.parametrize("protocol", [None, "nnunet", "monai"])
def test_classes_without_annotation_have_no_score(protocol):
    """Neither for what is predicted nor for what is missed; the others keep theirs."""
    label, prediction = pair()
    whole = scored(label, prediction, protocol=protocol)
    found = scored(label, prediction, annotated=(1,), protocol=protocol)
    assert np.isnan(found.scores["dice"][2:]).all()
    for name, own in found.scores.items():
        np.testing.assert_array_equal(own[1], whole.scores[name][1])
        assert np.isnan(own[2:]).all()
    evaluation = Evaluation([found], {})
    assert not evaluation.false_positives().any() and not evaluation.missed().any()
    assert Evaluation([whole], {}).false_positives()[0, 3]
    assert found.notes == ["it annotates 1 of 3 classes"]


def test_ignored_voxels_count_for_nothing():
    label, prediction = pair()
    known = scored(label[:6], prediction[:6])
    label[6:] = IGNORED
    prediction[6:] = np.random.default_rng(0).integers(0, 4, (4, 6, 6))
    found = scored(label, prediction)
    for a, b in zip(found.counts[:2], known.counts[:2], strict=True):
        np.testing.assert_array_equal(a[1:], b[1:])
    np.testing.assert_array_equal(found.scores["dice"][1:], known.scores["dice"][1:])


NAMES = ["liver", "spleen", "aorta"]


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Four scans; of the first two some classes, of the last a slab is annotated."""
    root = tmp_path_factory.mktemp("partial") / "data"
    for number, name in enumerate("abcd"):
        label = np.zeros((16, 16, 16), np.uint8)
        for k in (1, 2, 3):
            label[4 * k : 4 * k + 3, 3:12, 2 + number : 12] = k
        hu = np.where(label > 0, 100 + 200 * label.astype(int), 0).astype(np.int16)
        (root / name).mkdir(parents=True)
        for what, array in (("ct", hu), ("labels", label)):
            image = nib.Nifti1Image(array, np.diag([6.0, 6, 6, 1]))
            nib.save(image, root / name / f"{what}.nii.gz")
    content = {
        **{"classes": NAMES, "annotated": {"a": ["liver"], "b": NAMES[1:]}},
        **{"image": "{case}/ct.nii.gz", "labels": "{case}/labels.nii.gz"},
        "splits": {"train": ["a", "b"], "val": ["c"], "test": ["d"]},
    }
    (root / "dataset.json").write_text(json.dumps(content))
    return root


@pytest.mark.slow
def test_a_network_learns_from_parts_and_is_scored_by_parts(root, tmp_path):
    """On a store in parts of a batch; evaluated on the store and on the files."""
    store, run = tmp_path / "store", tmp_path / "run"
    assert preprocess(root, store) == {}
    values = demo.get_config()
    values.model = {
        **{"name": "nnunet_plain", "in_channels": 1, "out_channels": 4},
        **{"features_per_stage": (4, 6), "strides": (1, 2), "dtype": "float32"},
        **{"n_conv_per_stage": 1, "n_conv_per_stage_decoder": 1},
    }
    values.data.update({"root": str(store), "patch_shape": (16, 16, 16)})
    values.data.update({"batch_size": 2, "foreground_ratio": 1.0})
    values.optimizer.update({"learning_rate": 2e-2, "warmup_steps": 1})
    values.training.update({"num_steps": 80, "accumulate": 2, "seed": 1})
    values.mesh = {"data": 1, "expert": 1}
    config = from_config_dict(values)
    state = loop.train(config, workdir=run, validate=validation.validate)
    assert int(state.skipped[0]) == 0
    jax.block_until_ready(state.params)
    config, model, _ = load_model(run)
    results = {}
    for split in ("train", "test"):
        evaluate_split(
            model,
            config,
            split=split,
            groups={},
            rule="over_classes",
            output=tmp_path / split,
        )
        results[split] = json.loads((tmp_path / split / "results.json").read_text())
    scores = {n: case["dice"] for n, case in results["train"]["cases"].items()}
    known = {n: {c for c, v in s.items() if v is not None} for n, s in scores.items()}
    assert known == {"a": {"liver"}, "b": {"spleen", "aorta"}}
    # Each class is learnt, though no case has all.
    assert min(results["test"]["cases"]["d"]["dice"].values()) > 0.5
    table = evaluate_predictions(
        _as_predictions(root, tmp_path / "files"),
        root=root,
        split="train",
        rule="over_classes",
        output=tmp_path / "of_files",
    )
    assert "100.00" in table
    files = json.loads((tmp_path / "of_files/results.json").read_text())
    assert files["false_positives"] == 0 or "false_positives" not in files


def _as_predictions(root, folder):
    """All labels of the files, as a network that knows all classes would give them."""
    folder.mkdir()
    for name in "ab":
        (folder / f"{name}.nii.gz").symlink_to(root / name / "labels.nii.gz")
    return folder
