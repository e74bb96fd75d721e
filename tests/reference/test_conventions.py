"""Each protocol against the tool itself, on thirty pairs of label maps."""

import nibabel as nib
import numpy as np
import pytest

from benchmarks import masks
from swinsmt_jax.evaluation import averages, conventions, metrics, overlap, scoring

pytestmark = [pytest.mark.reference, pytest.mark.filterwarnings("ignore")]
PACKAGES = {"nnunet": "nnunetv2", "totalseg": "surface_distance"}
CLASSES = 5


def tool(protocol):
    package = PACKAGES.get(protocol, protocol.replace("-", "_"))
    return pytest.importorskip(package) and masks.TOOLS[protocol]


def scored(protocol, prediction, truth, spacing):
    """Return the scores [K] of all metrics of a protocol."""
    own = conventions.convention(protocol)
    tolerance = masks.TOLERANCE if own.tolerance == 0 else None
    rule = conventions.surface_rule(protocol, tolerance=tolerance)
    chosen = metrics.chosen_metrics(surface_rule=rule, protocol=protocol)
    counts = overlap.overlap_counts(prediction, truth, num_classes=CLASSES)
    pair = overlap.Pair(prediction, truth, counts, spacing)
    return metrics.measured(pair, chosen, surface_rule=rule)


@pytest.mark.parametrize("protocol", conventions.CONVENTIONS)
def test_each_protocol_gives_the_numbers_of_its_tool(protocol):
    measure, compared = tool(protocol), 0
    for prediction, truth, spacing in masks.thirty_pairs():
        found = scored(protocol, prediction, truth, spacing)
        for k in range(1, CLASSES):
            expected = measure(prediction == k, truth == k, spacing=spacing)
            assert expected.keys() == found.keys()
            for name, value in expected.items():
                # Or by what float32 loses, in which MONAI interpolates.
                value = np.nan if value is None else value  # the tool refuses
                close = pytest.approx(value, abs=1e-6, rel=3e-6, nan_ok=True)
                assert found[name][k] == close, (name, k)
                compared += 1
    assert compared >= 30 * (CLASSES - 1)


def evaluation(protocol):
    """Return the evaluation of ten pairs."""
    results = []
    for prediction, truth, spacing in list(masks.thirty_pairs())[:10]:
        counts = overlap.overlap_counts(prediction, truth, num_classes=CLASSES)
        scores = scored(protocol, prediction, truth, spacing)
        results.append(scoring.CaseResult(str(len(results)), counts, 0.0, scores))
    rule = conventions.convention(protocol).average
    return scoring.Evaluation(results, {"first": [1, 2]}, rule)


def test_the_mean_of_monai_is_over_classes_and_then_over_cases():
    monai, torch = pytest.importorskip("monai.metrics"), pytest.importorskip("torch")
    dice = monai.DiceMetric(include_background=False)
    hausdorff = monai.HausdorffDistanceMetric(percentile=95)
    for prediction, truth, spacing in list(masks.thirty_pairs())[:10]:
        pair = [
            torch.from_numpy(np.moveaxis(np.eye(CLASSES)[x], -1, 0)[None])
            for x in (prediction, truth)
        ]
        dice(*pair)
        hausdorff(*pair, spacing=list(spacing))
    found = evaluation("monai")
    for name, tool in (("dice", dice), ("hd95", hausdorff)):
        mean = found.means(metrics.METRICS[name])["overall"]
        assert mean == pytest.approx(float(tool.aggregate()), rel=1e-6)


@pytest.mark.parametrize("absent", [False, True])
def test_the_mean_of_nnunet_is_that_of_its_summary(tmp_path, absent):
    pytest.importorskip("nnunetv2")
    from nnunetv2.evaluation.evaluate_predictions import compute_metrics_on_folder
    from nnunetv2.imageio.nibabel_reader_writer import NibabelIO

    for name, at in (("a", 0), ("b", 1)):
        (tmp_path / name).mkdir()
        for i, pair in enumerate(list(masks.thirty_pairs())[:10]):
            image = nib.Nifti1Image(pair[at], np.eye(4))
            nib.save(image, tmp_path / name / f"{i}.nii.gz")
    classes = [1, 2, 3, 4, 5] if absent else [1, 2, 3, 4]
    summary = compute_metrics_on_folder(
        str(tmp_path / "b"),
        str(tmp_path / "a"),
        None,
        NibabelIO(),
        ".nii.gz",
        classes,
        num_processes=1,
    )
    found = evaluation("nnunet").scores(metrics.DICE)
    if absent:
        found = np.pad(found, ((0, 0), (0, 1)), constant_values=np.nan)
    mean = averages.averages(found)["over_all_classes"]
    expected = summary["foreground_mean"]["Dice"]
    assert mean == pytest.approx(expected, abs=1e-6, nan_ok=True)
    assert np.isnan(mean) == absent
