"""The recipe of docs/extending.md: a metric in one small module, shown everywhere."""

import csv
import json
import re
import runpy
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from swinsmt_jax.checks import UserError
from swinsmt_jax.evaluation.metrics import METRICS
from swinsmt_jax.evaluation.predictions import evaluate_predictions
from swinsmt_jax.evaluation.surface import SurfaceRule

DOCS = Path(__file__).resolve().parents[2] / "docs"
CLASSES = ["liver", "spleen"]


@pytest.fixture
def recipe(tmp_path):
    """Run the listings of the section as a module, and forget its metrics after."""
    before = dict(METRICS)
    (section,) = re.findall(
        r"^## A metric\n(.*?)(?=^## |\Z)",
        (DOCS / "extending.md").read_text(),
        re.DOTALL | re.MULTILINE,
    )
    path = tmp_path / "my_metrics.py"
    path.write_text("\n".join(re.findall(r"```python\n(.*?)```", section, re.DOTALL)))
    for name in re.findall(r'Metric\(\s*"(\w+)"', path.read_text()):
        METRICS.pop(name, None)  # pasted into metrics.py, as the section says
    yield lambda: runpy.run_path(str(path), run_name="my_metrics")
    METRICS.clear()
    METRICS.update(before)


@pytest.fixture
def dataset(tmp_path):
    """A case of two cubes: the liver predicted a voxel longer, the spleen missed."""
    truth = np.zeros((14, 12, 10), np.uint8)
    truth[2:6, 2:6, 2:6], truth[8:12, 2:6, 2:6] = 1, 2
    prediction = np.where(truth == 2, 0, truth)
    prediction[2:6, 2:6, 6] = 1
    affine = np.diag([2.0, 2.0, 2.0, 1.0])
    files = {"a_ct": truth.astype(np.int16), "a_labels": truth, "a": prediction}
    for name, array in files.items():
        nib.save(nib.Nifti1Image(array, affine), tmp_path / f"{name}.nii.gz")
    layout = {"image": "{case}_ct.nii.gz", "labels": "{case}_labels.nii.gz"}
    layout |= {"classes": CLASSES, "splits": {"test": ["a"]}}
    (tmp_path / "dataset.json").write_text(json.dumps(layout))
    return tmp_path


def evaluated(dataset, folder=None, **options):
    return evaluate_predictions(
        folder or dataset,
        root=dataset,
        split="test",
        rule="over_classes",
        output=dataset / "results",
        workers=1,
        **options,
    )


def read(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_an_own_metric_is_in_every_table_and_file(recipe, dataset):
    recipe()
    table = evaluated(dataset, surface_rule=SurfaceRule())
    rows = {line.strip().split("  ")[0]: line.split()[-1] for line in table.split("\n")}
    assert rows["volume diff."] == "-37.5"  # the mean of + 25 % and - 100 %
    assert rows["Hausdorff (mm)"] == "2.0"
    output = dataset / "results"
    content = json.loads((output / "results.json").read_text())
    assert content["volume_difference"] == {"overall": -0.375}
    own = content["cases"]["a"]
    assert own["volume_difference"] == {"liver": 0.25, "spleen": -1.0}
    assert own["hausdorff"] == {"liver": 2.0, "spleen": None}
    liver, spleen = read(output / "per_class.csv")
    assert (liver["volume_difference"], spleen["hausdorff"]) == ("0.250000", "")
    (case,) = read(output / "per_case.csv")
    assert (case["volume_difference"], case["hausdorff"]) == (
        "-0.375000",
        "2.000000",
    )
    page = (output / "report.html").read_text()
    assert page.count("<th>Hausdorff (mm)") == page.count("<th>volume diff.") == 2
    assert "<td>-100.0" in page


def test_what_is_not_measured_is_empty(recipe, dataset):
    recipe()
    table = evaluated(dataset, metrics=["dice", "volume_difference"])
    assert "volume diff." in table and "Hausdorff" not in table
    content = json.loads((dataset / "results" / "results.json").read_text())
    assert content["hausdorff"] is None and content["surface_dice"] is None
    assert "hausdorff" not in content["cases"]["a"]
    (case,) = read(dataset / "results" / "per_case.csv")
    assert case["hausdorff"] == "" and case["volume_difference"] != ""


def test_metrics_that_cannot_be_measured_are_refused(recipe, dataset):
    with pytest.raises(UserError, match="metrics is 'dica'.* Did you mean 'dice'"):
        evaluated(dataset, metrics=["dica"])
    with pytest.raises(UserError, match="must have 'dice'"):
        evaluated(dataset, metrics=["surface_dice"])
    recipe()
    with pytest.raises(UserError, match="'volume_difference' is registered already"):
        recipe()
