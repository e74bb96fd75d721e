"""Beside scores: confidence, warnings about anatomy, and pages of the worst cases."""

import html
import json

import jax
import jax.numpy as jnp
import nibabel as nib
import numpy as np
import pytest

from swinsmt_jax.checks import UserError
from swinsmt_jax.config import from_config_dict
from swinsmt_jax.evaluation.evaluate_split import evaluate_split
from swinsmt_jax.evaluation.looks import WORST, Looks
from swinsmt_jax.evaluation.metrics import chosen_metrics
from swinsmt_jax.evaluation.predictions import evaluate_predictions

CLASSES = ["liver", "kidney_left", "kidney_right"]
CASES = [f"case{i}" for i in range(WORST + 1)]


@pytest.fixture
def root(tmp_path):
    """Cases of which the first is predicted right, and the last has sides exchanged."""
    labels = np.zeros((30, 14, 12), np.uint8)
    labels[10:20, 4:10, 2:8], labels[2:6, 4:8, 2:6], labels[24:28, 4:8, 2:6] = 1, 2, 3
    image = np.where(labels > 0, 250 * labels.astype(np.int16) + 100, 50)
    image[12, 5, 4:8] = 380  # between two classes
    (tmp_path / "predictions").mkdir()
    for i, case in enumerate(CASES):
        predicted = labels.copy()
        predicted[10 : 10 + i] = 0
        if case == CASES[-1]:
            predicted = np.array([0, 1, 3, 2], np.uint8)[predicted]
        for name, array in (
            (f"{case}_ct", image.astype(np.int16)),
            (f"{case}_labels", labels),
            (f"predictions/{case}", predicted),
        ):
            file = tmp_path / f"{name}.nii.gz"
            nib.save(nib.Nifti1Image(array, np.diag([8.0, 8, 8, 1])), file)
    layout = {"image": "{case}_ct.nii.gz", "labels": "{case}_labels.nii.gz"}
    layout |= {"classes": CLASSES, "splits": {"test": CASES}}
    (tmp_path / "dataset.json").write_text(json.dumps(layout))
    return tmp_path


def evaluated(root, **looks):
    evaluate_predictions(
        root / "predictions",
        **{"root": root, "split": "test", "rule": "over_classes", "workers": 1},
        output=root / "results",
        metrics=["dice"],
        looks=Looks(**looks),
    )
    report = (root / "results/report.html").read_text()
    return json.loads((root / "results/results.json").read_text())["cases"], report


def test_warnings_name_case_structure_and_reason(root):
    cases, report = evaluated(root, quality=True)
    assert all(not case["warnings"] for name, case in cases.items() if name != CASES[5])
    warnings = cases[CASES[5]]["warnings"]
    assert {(w["check"], w["structure"]) for w in warnings} == {
        ("side", "kidney_left"),
        ("side", "kidney_right"),
    }
    assert all(w["reason"] in html.unescape(report) for w in warnings)
    cases, report = evaluated(root)
    assert not any(case["warnings"] for case in cases.values())
    assert "Anatomy" not in report


def test_the_worst_cases_are_opened_with_truth_beside_prediction(root):
    pytest.importorskip("ipyniivue")
    _, report = evaluated(root, view=True)
    pages = {file.name for file in (root / "results").glob("view_*.html")}
    assert pages == {f"view_{case}.html" for case in CASES[1:]}  # not the best
    assert all(f'href="{page}"' in report for page in pages)
    page = (root / f"results/view_{CASES[1]}.html").read_text()
    assert ">truth<" in page and ">prediction<" in page
    found = json.loads(
        page.split('id="data" type="application/json">')[1].split("</script>")[0]
    )
    liver = next(s for s in found["structures"] if s["name"] == "liver")
    assert liver["truth_ml"] == pytest.approx(10 * 36 * 0.512)
    assert liver["volume_ml"] == pytest.approx(9 * 36 * 0.512)
    assert [m["title"] for m in found["maps"]] == ["truth", "labels"]
    assert found["maps"][0]["nifti"] != found["maps"][1]["nifti"]


@jax.jit
def by_brightness(windows):
    return -8 * jnp.abs(windows * 4 - 0.5 - jnp.arange(4))


def test_the_report_says_how_sure_the_network_is(root):
    model = {"name": "swin_unetr", "in_channels": 1, "out_channels": 4}
    config = from_config_dict(
        {
            "model": model | {"feature_size": 12},
            "data": {
                **{"root": str(root), "patch_shape": (32, 32, 32), "batch_size": 1},
                **{"hu_range": (0.0, 1000.0), "classes": CLASSES},
            },
            "optimizer": {"learning_rate": 1e-3},
            "training": {"num_steps": 1},
        }
    )
    evaluate_split(
        jax.tree_util.Partial(by_brightness),
        config,
        **{"split": "test", "groups": {"all": (1, 2, 3)}, "rule": "over_classes"},
        output=root / "results",
        limit=1,
        metrics=["dice"],
        looks=Looks(confidence=True),
    )
    found = json.loads((root / "results/results.json").read_text())
    case, grey = found["cases"][CASES[0]], np.full(360, 0.35)
    grey[:4] = 0.38
    logits = -8 * np.abs(4 * grey[:, None] - 0.5 - np.arange(4))
    share = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    assert case["mean_probability"]["liver"] == pytest.approx(
        share[:, 1].mean(), abs=1e-3
    )
    assert case["share_within_0.1_of_second"]["liver"] == 0
    report = (root / "results/report.html").read_text()
    assert "second within 0.1" in report and "5th percentile" in report


def test_files_and_flags_that_cannot_tell_confidence_are_refused(root):
    with pytest.raises(UserError, match="label files contain no probabilities"):
        evaluated(root, confidence=True)
    with pytest.raises(UserError, match="needs the network's.*--confidence"):
        chosen_metrics(["dice", "mean_probability"], surface_rule=None)
