import csv
import dataclasses
import json

import numpy as np
import pytest

from swinsmt_jax import labels
from swinsmt_jax.data.sample import Sample
from swinsmt_jax.evaluation import tables
from swinsmt_jax.evaluation.metrics import DICE
from swinsmt_jax.evaluation.results import write_json, write_per_case, write_per_class
from swinsmt_jax.evaluation.scoring import Evaluation, score
from swinsmt_jax.runtime import files

GROUPS = {"organs": (1, 2), "ribs": (3,)}


def scored(name, prediction, truth, *, seconds=1.0, num_classes=4):
    prediction, truth = (np.array(x)[:, None, None] for x in (prediction, truth))
    scan = Sample(truth, truth, np.eye(4), name)
    options = dict(seconds=seconds, num_classes=num_classes, metrics=[DICE])
    return score(scan, prediction, **options).result


@pytest.fixture
def results():
    """Two cases: 1 found and half found, 2 missed, 3 absent but predicted once."""
    return [
        scored("s0001", [0, 1, 1, 0, 3], [0, 1, 1, 2, 0], seconds=1.5),
        scored("s0002", [0, 0, 1, 0], [0, 1, 1, 0], seconds=2.0),
    ]


def read(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_the_table_shows_all_averages_and_what_they_hide(results):
    text = tables.dice_table(Evaluation(results, GROUPS, "over_cases"), title="Demo")
    lines = text.splitlines()
    assert lines[0] == "Demo"
    assert lines[2].split() == ["Dice", "(%)", "organs", "ribs", "overall"]
    # Class 1: 1 and 2/3; class 2: 0 in the first case alone; class 3: no value.
    assert lines[4].split() == [">", "over_cases", "58.33", "-", "58.33"]
    assert lines[5].split() == ["over_classes", "41.67", "-", "41.67"]
    assert lines[6].split() == ["over_pairs", "55.56", "-", "55.56"]
    assert lines[7].split()[-3:] == ["2/2", "0/1", "2/3"]
    assert lines[8].split() == ["missed", "altogether", "1", "0", "1"]
    assert lines[9].split()[-3:] == ["0", "1", "1"]
    assert lines[10].split()[:3] == ["95", "%", "interval"]
    assert "surface Dice" not in text
    assert "> over_cases: mean over classes present in each case" in text
    assert "absent from the truth: 1 (case, class) pairs, 1 classes." in text
    assert max(len(line) for line in lines) < 100


def test_the_authors_rows_stand_below_ours():
    results = [scored("s0001", range(118), range(118), num_classes=118)]

    def table(groups):
        evaluation = Evaluation(results, groups, "over_pairs")
        return tables.dice_table(evaluation, title="T", reported=True)

    lines = table(labels.GROUPS).splitlines()
    assert (
        "organs vertebrae muscles ribs vessels overall".split() == lines[2].split()[2:]
    )
    start = lines.index("Reported, by the authors")
    theirs = [line.split() for line in lines[start + 1 : start + 13]]
    assert theirs[0] == "UNETR 73.84 60.70 82.35 69.27 61.49 70.88".split()
    assert theirs[-1] == "Swin SMT 83.70 83.03 88.70 86.60 77.54 85.09".split()
    assert lines[start + 13] == lines[1]  # the table ends
    assert "MI2DataLab/SwinSMT" in table(labels.GROUPS)
    assert "does not say how it averages" in table(labels.GROUPS)
    assert max(map(len, lines)) < 100
    swapped = dict(reversed(labels.GROUPS.items()))
    found = [line.split() for line in table(swapped).splitlines()]
    assert "Swin SMT 77.54 86.60 88.70 83.03 83.70 85.09".split() in found
    assert "Reported" not in table({**labels.GROUPS, "ribs": (92,)})


def test_surface_dice_is_averaged_under_the_same_rule(results, tmp_path):
    given = ([np.nan, 1.0, 0.5, np.nan], [np.nan, 0.5, np.nan, np.nan])
    measured = [
        dataclasses.replace(r, scores=r.scores | {"surface_dice": np.array(s)})
        for r, s in zip(results, given, strict=True)
    ]
    text = tables.dice_table(Evaluation(measured, GROUPS, "over_cases"), title="Demo")
    (line,) = (x for x in text.splitlines() if "surface Dice" in x)
    assert line.split()[2:] == ["62.50", "-", "62.50"]
    write_per_class(tmp_path / "c.csv", Evaluation(measured, GROUPS))
    values = [row["surface_dice"] for row in read(tmp_path / "c.csv")]
    assert values == ["0.750000", "0.500000", ""]
    write_per_case(tmp_path / "c.csv", Evaluation(measured, GROUPS))
    assert read(tmp_path / "c.csv")[0]["surface_dice"] == "0.750000"


def test_per_class_rows(results, tmp_path):
    write_per_class(tmp_path / "c.csv", Evaluation(results, GROUPS))
    first, second, third = read(tmp_path / "c.csv")
    assert (first["id"], first["class"], first["groups"]) == ("1", "spleen", "organs")
    assert float(first["dice"]) == pytest.approx(5 / 6, abs=1e-6)
    assert float(first["dice_min"]) == pytest.approx(2 / 3, abs=1e-6)
    assert float(first["dice_max"]) == 1 and first["cases"] == "2"
    assert (second["dice"], second["cases"], second["missed"]) == ("0.000000", "1", "1")
    assert (third["dice"], third["dice_min"], third["cases"]) == ("", "", "0")
    assert third["false_positives"] == "1"


def test_per_case_rows(results, tmp_path):
    write_per_case(tmp_path / "c.csv", Evaluation(results, GROUPS))
    first, second = read(tmp_path / "c.csv")
    assert first["case"] == "s0001" and float(first["organs"]) == 0.5
    assert first["ribs"] == "" and first["seconds"] == "1.50"
    counts = [first[k] for k in ("classes", "missed", "false_positives")]
    assert counts == ["2", "1", "1"]
    assert float(second["overall"]) == pytest.approx(2 / 3, abs=1e-6)


def test_json_has_every_score_and_no_nan(results, tmp_path):
    path = tmp_path / "r.json"
    about = {"split": "test", "step": np.int64(3).item()}
    write_json(path, Evaluation(results, GROUPS, "over_pairs"), about=about)
    content = json.loads(path.read_text(), parse_constant=pytest.fail)
    assert content["split"] == "test" and content["step"] == 3
    assert content["average"] == "over_pairs"
    assert content["dice"] == {"organs": 0.555556, "ribs": None, "overall": 0.555556}
    assert content["dice_by_average"]["overall"]["over_cases"] == 0.583333
    assert content["groups"]["ribs"] == ["kidney_left"]
    case = content["cases"]["s0001"]
    assert case["dice"]["spleen"] == 1 and case["dice"]["kidney_left"] is None
    assert case["false_positives"] == ["kidney_left"]


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "r.json"
    path.write_text("old")
    with pytest.raises(RuntimeError), files.replacing(path) as partial:
        partial.write_text("half")
        raise RuntimeError
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]
