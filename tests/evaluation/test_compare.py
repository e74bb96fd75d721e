import itertools
import json

import numpy as np
import pytest
from scipy import stats

from swinsmt_jax.checks import UserError
from swinsmt_jax.evaluation.compare import compare, table
from swinsmt_jax.evaluation.fold_table import fold_table

GROUPS = {"organs": ["spleen", "liver"], "ribs": ["rib_left_1"]}
CLASSES = ["spleen", "liver", "rib_left_1"]


@pytest.fixture
def write(tmp_path):
    """Write an evaluation with Dice [cases, classes]; NaN is absent."""

    def write(name, scores, groups=GROUPS, cases=None, split="test", **about):
        folder = tmp_path / name
        folder.mkdir(parents=True)
        names = cases or [f"s{i}" for i in range(len(scores))]
        content = about | {
            "split": split,
            "groups": groups,
            "cases": {
                case: {
                    "dice": {
                        c: None if np.isnan(v) else v
                        for c, v in zip(CLASSES, row, strict=True)
                    }
                }
                for case, row in zip(names, scores, strict=True)
            },
        }
        (folder / "results.json").write_text(json.dumps(content))
        return folder

    return write


def exact_p(change):
    """Two-sided p of the signed ranks over all signs, by counting."""
    ranks = stats.rankdata(np.abs(change))
    seen = abs((ranks * np.sign(change)).sum())
    sums = [
        abs(np.dot(signs, ranks))
        for signs in itertools.product((-1, 1), repeat=len(ranks))
    ]
    return np.mean(np.array(sums) >= seen - 1e-9)


def test_the_statistics_are_those_of_the_pairs(write, rng):
    first = rng.uniform(0.4, 0.8, (9, 3))
    first[0, :2] = np.nan  # a case without organs
    second = first + rng.normal(0.03, 0.05, (9, 3))
    found = {d.group: d for d in compare(write("a", first), write("b", second))}
    assert list(found) == ["organs", "ribs", "overall"]
    change = second[:, 2] - first[:, 2]
    ribs = found["ribs"]
    assert ribs.second - ribs.first == pytest.approx(change.mean())
    assert ribs.p == pytest.approx(exact_p(change))
    low, high = ribs.interval
    assert low < change.mean() < high and high - low < 0.2
    assert found["organs"].cases == 8 and found["overall"].cases == 9
    p = sorted(d.p for d in found.values())
    assert min(d.holm for d in found.values()) == pytest.approx(min(1, 3 * p[0]))
    assert all(d.holm >= d.p for d in found.values())


def test_a_clear_difference_is_marked_and_none_is_not(write, rng):
    first = rng.uniform(0.4, 0.6, (12, 3))
    a, b, c = write("a", first), write("b", first + 0.2), write("c", first)
    better = compare(a, b)
    assert all(d.effect == 1 and d.holm < 0.01 for d in better)
    text = table(better, first="runs/a", second="runs/b")
    assert "+20.00" in text and text.count("*") == 3 and "A: runs/a" in text
    same = compare(a, c)
    assert all(d.p == 1 and d.effect == 0 and d.interval == (0, 0) for d in same)
    assert compare(b, a)[0].effect == -1


def test_few_cases_have_no_p(write, rng):
    scores = rng.uniform(0.4, 0.6, (5, 3))
    found = compare(write("a", scores), write("b", scores + 0.1))
    assert all(np.isnan(d.p) and np.isnan(d.holm) for d in found)
    assert "fewer than 6 cases" in table(found, first="a", second="b")


def test_what_cannot_be_paired_is_refused(write, tmp_path):
    a = write("a", np.ones((2, 3)))
    with pytest.raises(UserError, match="share 0 of 2 and 2. Evaluate the same split"):
        compare(a, write("b", np.ones((2, 3)), cases=["x", "y"]))
    with pytest.raises(UserError, match="other groups"):
        compare(a, write("c", np.ones((2, 3)), groups={"all": CLASSES}))
    with pytest.raises(UserError, match="nowhere.* holds no results of an evaluation"):
        compare(a, tmp_path / "nowhere")


def test_other_classes_or_another_split_cannot_be_paired(write):
    scores = np.full((7, 3), 0.5)
    a = write("a", scores)
    with pytest.raises(UserError, match="'test' and .* 'val'; compare .* same split"):
        compare(a, write("b", scores, split="val"))
    fewer = scores.copy()
    fewer[2, 1] = np.nan
    with pytest.raises(UserError, match="scored 1 classes of the case 's2': liver"):
        compare(a, write("c", fewer))


@pytest.mark.parametrize(
    ("one", "other", "words"),
    [
        (
            {"surface_tolerance_mm": 3.0, "surface_spacing": None},
            {"surface_tolerance_mm": 2.0, "surface_spacing": None},
            "tolerance of surfaces in mm is 3.0 and 2.0; .*--surface_tolerance",
        ),
        (
            {"surface_tolerance_mm": 3.0, "surface_spacing": None},
            {"surface_tolerance_mm": 3.0, "surface_spacing": [1.5, 1.5, 1.5]},
            "voxels of surfaces in mm is the scan's own and .1.5, 1.5, 1.5.;",
        ),
        (
            {"convention": "swinsmt_jax"},
            {"convention": "MONAI 1.6.1"},
            "convention is swinsmt_jax and MONAI 1.6.1; .*--protocol",
        ),
        (
            {"convention": "swinsmt_jax", "cut_faces": "count"},
            {"convention": "swinsmt_jax", "cut_faces": "ignore"},
            "cut faces is count and ignore; .*--cut_faces",
        ),
    ],
)
def test_different_conventions_are_not_compared(write, one, other, words):
    scores = np.full((7, 3), 0.5)
    a, b = write("a", scores, **one), write("b", scores, **other)
    with pytest.raises(UserError, match=f"different conventions: the {words}"):
        compare(a, b)
    assert compare(a, write("same", scores, **one))
    assert compare(b, write("without_surfaces", scores))


def test_the_folder_of_a_run_stands_for_its_evaluation(write, tmp_path):
    scores = np.full((7, 3), 0.5)
    write("run/eval_test", scores)
    write("run/eval_val", scores + 0.2, split="val")
    other = write("other", scores + 0.1)
    assert compare(tmp_path / "run", other)[0].second == pytest.approx(0.6)
    last = write("last", scores, split="val")
    found = compare(tmp_path / "run", last, split="val")
    assert found[0].first == pytest.approx(0.7)


@pytest.mark.parametrize(
    ("entry", "other", "words"),
    [
        ("grid", [9, 9, 9, 1.0, 1.0, 1.0], "other grids, such as s0"),
        ("truth", {"spleen": [5, 13.0]}, "other truths, such as s0"),
    ],
)
def test_other_grids_and_truths_do_not_compare(write, entry, other, words):
    a, b = (write(name, np.full((1, 3), 0.5)) for name in "ab")
    told = {"grid": [8, 9, 9, 1.0, 1.0, 1.0], "truth": {"spleen": [5, 12.0]}}
    for folder, changes in ((a, {}), (b, {entry: other})):
        content = json.loads((folder / "results.json").read_text())
        content["cases"]["s0"] |= told | changes
        (folder / "results.json").write_text(json.dumps(content))
    assert compare(a, a)
    with pytest.raises(UserError, match=words):
        compare(a, b)


def test_folds_stand_side_by_side(write):
    folders = [
        write(name, np.full((2, 3), dice), cases=[f"{name}1", f"{name}2"], split="val")
        for name, dice in (("a", 0.4), ("b", 0.6))
    ]
    for folder, dice in zip(folders, (0.4, 0.6), strict=True):
        content = json.loads((folder / "results.json").read_text())
        content["dice"] = dict.fromkeys([*GROUPS, "overall"], dice)
        (folder / "results.json").write_text(json.dumps(content))
    *_, last = fold_table(folders).splitlines()
    assert last.split()[:3] == ["mean", "+-", "deviation"] and "50.00 +- 14.14" in last
    with pytest.raises(UserError, match="'a1' is in the results of"):
        fold_table([folders[0], folders[0]])
