"""HD95, ASSD and volumes, missed structures and faces where the scan ends."""

import numpy as np
import pytest
import surface_distance

from swinsmt_jax.evaluation.conventions import surface_rule
from swinsmt_jax.evaluation.metrics import chosen_metrics, measured
from swinsmt_jax.evaluation.overlap import Pair, overlap_counts


def box(shape, *sides):
    labels = np.zeros(shape, np.uint8)
    labels[tuple(slice(*side) for side in sides)] = 1
    return labels


def scored(prediction, truth, spacing=(1.0, 1.0, 1.0), **options):
    """Return the scores of class 1 by metric."""
    classes = int(max(truth.max(), prediction.max(), 1)) + 1
    rule = surface_rule(None, tolerance=options.pop("tolerance", None), **options)
    pair = Pair(
        prediction,
        truth,
        overlap_counts(prediction, truth, num_classes=classes),
        spacing,
    )
    chosen = chosen_metrics(surface_rule=rule)
    found = measured(pair, chosen, surface_rule=rule)
    return {name: scores[1] for name, scores in found.items()}


def noise(seed, share):
    return (np.random.default_rng(seed).random((9, 8, 7)) < share).astype(np.uint8)


CORNER = box((30, 9, 9), (0, 2), (1, 4), (1, 4))
FAR = box((30, 9, 9), (27, 30), (5, 8), (0, 9))
CUBE = box((20, 20, 20), (5, 10), (5, 10), (5, 10))
LONGER = box((20, 20, 20), (5, 12), (5, 9), (5, 17))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize(
    "prediction, truth, spacing",
    [
        (CORNER, FAR, (3.0, 1.0, 0.7)),
        (LONGER, CUBE, (1.5, 1.5, 1.5)),
        (noise(1, 0.2), noise(2, 0.1), (0.6, 2.0, 1.0)),
    ],
    ids=["far apart", "longer", "noise"],
)
def test_distances_are_by_area_as_deepminds_package_measures(
    prediction, truth, spacing
):
    found = scored(prediction, truth, spacing)
    theirs = surface_distance.compute_surface_distances(
        truth.astype(bool), prediction.astype(bool), spacing
    )
    assert found["hd95"] == surface_distance.compute_robust_hausdorff(theirs, 95)
    sums = [
        theirs[f"distances_{way}"] @ theirs[f"surfel_areas_{own}"]
        for way, own in (("gt_to_pred", "gt"), ("pred_to_gt", "pred"))
    ]
    area = theirs["surfel_areas_gt"].sum() + theirs["surfel_areas_pred"].sum()
    assert found["assd"] == pytest.approx(sum(sums) / area, abs=1e-12)
    assert found["hd95_penalised"] == found["hd95"]


def test_a_missed_structure_has_no_distance_but_a_penalty_by_name():
    truth = CUBE
    found = scored(np.zeros_like(truth), truth, (1.0, 2.0, 3.0))
    assert np.isnan(found["hd95"]) and np.isnan(found["assd"])
    diagonal = 20 * np.sqrt(1 + 4 + 9)
    assert found["hd95_penalised"] == pytest.approx(diagonal)
    assert found["assd_penalised"] == pytest.approx(diagonal)
    assert found["dice"] == found["surface_dice"] == 0
    assert found["volume"] == -1 and found["volume_ml"] == pytest.approx(-0.75)
    invented = scored(truth, np.zeros_like(truth))
    assert all(np.isnan(list(invented.values())))


def test_faces_where_the_scan_ends_are_surface_unless_left_out():
    truth = box((20, 20, 20), (0, 10), (0, 20), (0, 20))
    prediction = box((20, 20, 20), (0, 11), (0, 20), (0, 20))
    options = {"spacing": (3.0, 1.0, 1.0), "tolerance": 1.0}
    counted = scored(prediction, truth, **options)
    assert counted["surface_dice"] == pytest.approx(0.8798, abs=5e-5)
    assert counted["assd"] < 0.5
    without = scored(prediction, truth, **options, cut_faces=False)
    assert without["surface_dice"] == 0
    assert without["hd95"] == without["assd"] == 3.0
    inner = box((20, 20, 20), (3, 10), (4, 8), (5, 9))
    moved = np.roll(inner, 1, axis=0)
    expected = scored(moved, inner, **options)
    assert scored(moved, inner, **options, cut_faces=False) == expected


def test_slabs_of_a_large_structure_change_nothing(monkeypatch, rng):
    labels = rng.integers(0, 3, (2, 17, 9, 11)).astype(np.uint8)
    expected = scored(*labels, cut_faces=False)
    monkeypatch.setattr("swinsmt_jax.evaluation.surface.SLAB", 150)
    assert scored(*labels, cut_faces=False) == expected
