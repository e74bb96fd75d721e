"""Predictions of other tools: their grids, and what the results say of the metrics."""

import html
import json

import nibabel as nib
import numpy as np
import pytest

from swinsmt_jax.evaluation.metrics import METRICS
from swinsmt_jax.evaluation.predictions import evaluate_predictions
from swinsmt_jax.evaluation.surface import SurfaceRule
from swinsmt_jax.runtime.processes import SomeFailedError

SPACING = (2.0, 2.0, 3.0)
AFFINE = np.diag([*SPACING, 1.0])
CLASSES = ["liver", "spleen", "kidney"]


@pytest.fixture
def truth(tmp_path):
    """A case: a liver, a spleen, and a kidney that no case has."""
    labels = np.zeros((14, 12, 10), np.uint8)
    labels[2:6, 2:6, 2:6], labels[8:12, 2:6, 2:6] = 1, 2
    for name in ("a_ct", "a_labels"):
        array = labels.astype(np.int16 if name == "a_ct" else np.uint8)
        nib.save(nib.Nifti1Image(array, AFFINE), tmp_path / f"{name}.nii.gz")
    layout = {"image": "{case}_ct.nii.gz", "labels": "{case}_labels.nii.gz"}
    layout |= {"classes": CLASSES, "splits": {"test": ["a"]}, "modality": "MR"}
    (tmp_path / "dataset.json").write_text(json.dumps(layout))
    return labels


def evaluated(root, prediction, affine=AFFINE, **options):
    folder = root / "predictions"
    folder.mkdir(exist_ok=True)
    if prediction is not None:
        nib.save(nib.Nifti1Image(prediction, affine), folder / "a.nii.gz")
    table = evaluate_predictions(
        folder,
        root=root,
        split="test",
        rule="over_classes",
        output=root / "results",
        workers=1,
        surface_rule=SurfaceRule(),
        **options,
    )
    return table, json.loads((root / "results" / "results.json").read_text())


def moved(*mm):
    affine = AFFINE.copy()
    affine[:3, 3] += mm
    return affine


FLIPPED = AFFINE @ np.array([[1, 0, 0, 0], [0, 1, 0, 0], [0, 0, -1, 9], [0, 0, 0, 1.0]])


@pytest.mark.parametrize(
    "change, affine, words, dice",
    [
        (lambda x: x, moved(0, 0, 1.5), r"\+1.50\) mm.*half a voxel", 1),
        (lambda x: x[..., :-1], AFFINE, "9 planes to the head, and the other 10", 1),
        (lambda x: x, moved(2, 0, 0), r"lies \(\+2.00, \+0.00, \+0.00\) mm", 0.75),
        (lambda x: x, moved(0, 0, 27), "seems to run the other way", 0),
    ],
    ids=["half a voxel", "a slice short", "a voxel", "the wrong end first"],
)
def test_a_prediction_on_another_grid_is_named_in_mm(
    truth, tmp_path, change, affine, words, dice
):
    prediction = change(truth)
    with pytest.raises(SomeFailedError, match=f"{words}.*--regrid"):
        evaluated(tmp_path, prediction, affine)
    table, found = evaluated(tmp_path, prediction, affine, regrid=True)
    assert "Resampled (nearest) from another grid: 1 cases." in table
    assert "its first voxel lies" in found["regridded"]["a"]
    assert found["dice"]["overall"] == pytest.approx(dice, abs=1e-6)


def test_masks_on_another_grid_are_laid_on_the_scan_too(truth, tmp_path):
    masks = tmp_path / "predictions" / "a"
    masks.mkdir(parents=True)
    for k, name in enumerate(CLASSES, 1):
        mask = (truth[..., :-1] == k).astype(np.uint8)
        nib.save(nib.Nifti1Image(mask, AFFINE), masks / f"{name}.nii.gz")
    _, found = evaluated(tmp_path, None, regrid=True)
    assert found["dice"]["overall"] == 1 and list(found["regridded"]) == ["a"]


def test_a_prediction_whose_file_runs_the_other_way_lies_where_its_affine_says(
    truth, tmp_path
):
    _, found = evaluated(tmp_path, truth[..., ::-1], FLIPPED, regrid=True)
    assert found["dice"]["overall"] == 1 and found["regridded"] == {}


def test_results_say_what_each_number_is(truth, tmp_path):
    prediction = np.where(truth == 2, 0, truth)
    table, found = evaluated(tmp_path, prediction)
    rows = [line.split() for line in table.splitlines()]
    assert ["missed", "altogether", "1"] in rows and ["HD95", "(mm)", "0.00"] in rows
    (penalised,) = (
        row for row in rows if row[:5] == "HD95, missed = diagonal (mm)".split()
    )
    diagonal = np.linalg.norm(np.multiply(truth.shape, SPACING))
    assert float(penalised[-1]) == pytest.approx(diagonal / 2, abs=0.01)
    case = found["cases"]["a"]
    assert case["missed"] == ["spleen"] and case["hd95"]["spleen"] is None
    assert case["hd95"]["kidney"] is None and found["missed"] == 1
    assert found["convention"] == "swinsmt_jax" and found["cut_faces"] == "count"
    assert "No case has 1 of the classes: kidney" in table
    head = " ".join(table[: table.index("Dice (%)")].split())
    page = (tmp_path / "results" / "report.html").read_text()
    assert head in " ".join(html.unescape(page).split())
    measured = [m for m in METRICS.values() if not m.confidence]
    assert len(found["definitions"]) == len(measured)
    for name, definition in found["definitions"].items():
        assert definition in head, name
    assert "Tolerance of surface Dice: 3.0 mm" in head
    assert "cuts a structure count as surface" in head


def test_only_what_was_measured_is_told(truth, tmp_path):
    table, found = evaluated(tmp_path, truth, metrics=["dice", "hd95"])
    assert "Tolerance" not in table and "surface_tolerance_mm" not in found
    assert set(found["definitions"]) == {"dice", "hd95", "hd95_penalised"}
    assert "ASSD" not in (tmp_path / "results" / "report.html").read_text()


def test_a_protocol_gives_infinite_distances_as_its_tool(truth, tmp_path):
    prediction = np.where(truth == 2, 0, truth)
    table, found = evaluated(tmp_path, prediction, protocol="surface-distance")
    assert "Convention: surface-distance 0.1" in table
    assert found["cases"]["a"]["hd95"] == {"liver": 0, "spleen": "inf", "kidney": "inf"}
    assert found["hd95"]["overall"] == "inf" and found["volume"] is None
