"""Warnings on bodies with something wrong, and none on those without."""

import json

import numpy as np
import pytest

from swinsmt_jax.data import nifti
from swinsmt_jax.labels import CLASS_NAMES
from swinsmt_jax.phantoms.dataset import write_dataset
from swinsmt_jax.results import anatomy
from swinsmt_jax.results.result import Result

IDS = {name: i for i, name in enumerate(CLASS_NAMES) if i}
NAMES = {i: name for name, i in IDS.items()}


@pytest.fixture(scope="module")
def body(tmp_path_factory):
    """A whole body: volume and labels."""
    root = tmp_path_factory.mktemp("body")
    write_dataset(root, train=1, val=1, test=1, spacing=6.0, seed=0)
    largest = max(root.glob("s*/ct.nii.gz"), key=lambda f: f.stat().st_size)
    volume = nifti.load_ct(largest)
    labels = nifti.load_labels(largest.with_name("segmentations.nii.gz"), on=volume)
    return volume, labels.array


def found(volume, labels, **options):
    warnings = anatomy.check(Result(volume, labels, NAMES, **options))
    assert all(w.structure in w.reason and w.reason.endswith(".") for w in warnings)
    return {(w.check, w.structure) for w in warnings}


def swapped(labels, one, other):
    table = np.arange(256, dtype=np.uint8)
    table[[IDS[one], IDS[other]]] = IDS[other], IDS[one]
    return table[labels]


def test_a_sound_body_is_not_warned_of(body):
    volume, labels = body
    checks = {kind for kind, _ in found(volume, labels)}
    assert not checks & {"order", "gap", "side", "volume"}


@pytest.mark.parametrize(
    "change, warning",
    [
        (lambda x: np.where(x == IDS["vertebrae_T6"], 0, x), ("gap", "vertebrae_T6")),
        (
            lambda x: swapped(x, "vertebrae_L1", "vertebrae_L2"),
            ("order", "vertebrae_L2"),
        ),
        (lambda x: swapped(x, "rib_left_4", "rib_left_6"), ("order", "rib_left_6")),
        (
            lambda x: swapped(x, "rib_left_5", "rib_right_5"),
            ("side", "rib_left_5"),
        ),
        (
            lambda x: swapped(x, "kidney_left", "kidney_right"),
            ("side", "kidney_right"),
        ),
    ],
    ids=["missing vertebra", "numbers", "ribs", "sides of ribs", "sides of kidneys"],
)
def test_what_is_wrong_is_named(body, change, warning):
    volume, labels = body
    assert warning not in found(volume, labels)
    assert warning in found(volume, change(labels).astype(np.uint8))


def test_without_a_spine_the_midline_is_that_of_the_body(body):
    volume, labels = body
    keep = [IDS["kidney_left"], IDS["kidney_right"]]
    kidneys = np.where(np.isin(labels, keep), labels, 0).astype(np.uint8)
    assert not any(kind == "side" for kind, _ in found(volume, kidneys))
    wrong = swapped(kidneys, "kidney_left", "kidney_right")
    assert ("side", "kidney_left") in found(volume, wrong)


def test_a_piece_torn_off_is_named_and_cleaned(body):
    volume, labels = body
    torn = labels.copy()
    x, y, z = (int(n) for n in np.argwhere(labels == IDS["colon"]).mean(0))
    torn[x - 2 : x + 2, y - 2 : y + 2, 3:6] = IDS["spleen"]
    assert ("pieces", "spleen") in found(volume, torn)
    cleaned, removed = anatomy.clean(Result(volume, torn, NAMES))
    assert removed["spleen"] >= np.count_nonzero((torn != labels) & (labels == 0)) // 2
    assert ("pieces", "spleen") not in found(volume, cleaned)
    several = [i for i in NAMES if NAMES[i].lower() not in anatomy.single()]
    same = np.isin(torn, several)
    np.testing.assert_array_equal(cleaned[same], torn[same])  # bowels, vessels
    np.testing.assert_array_equal(cleaned != 0, (cleaned != 0) & (cleaned == torn))


def test_a_scan_cut_at_the_diaphragm_says_so(body):
    volume, labels = body
    top = int(np.argwhere(labels == IDS["liver"])[:, 2].mean())
    cut = nifti.from_array(volume.array[:, :, :top], volume.affine)
    warnings = found(cut, np.ascontiguousarray(labels[:, :, :top]))
    assert {("cut", "liver"), ("cut", "aorta")} <= warnings
    assert not any(kind in ("gap", "order") for kind, _ in warnings)
    halves = labels[:, :, :top].copy()  # pieces that may be joined outside are kept
    liver = np.argwhere(halves == IDS["liver"])
    halves[int(np.median(liver[:, 0])) + np.arange(2)] = 0
    result = Result(cut, np.ascontiguousarray(halves), {IDS["liver"]: "liver"})
    assert not [w for w in anatomy.check(result) if w.check == "pieces"]


def test_a_volume_beyond_the_training_set_is_named(body):
    volume, labels = body
    usual = {"spleen": (1000.0, 2000.0), "liver": (1.0, 9000.0), "heart": (0.1, 1.0)}
    warnings = found(volume, labels, usual_ml=usual)
    assert {s for kind, s in warnings if kind == "volume"} == {"spleen", "heart"}
    content = json.loads(anatomy.as_json(Result(volume, labels, NAMES, usual_ml=usual)))
    assert {w["structure"] for w in content["warnings"] if w["check"] == "volume"} == {
        "spleen",
        "heart",
    }


def test_the_table_of_single_structures_names_classes_and_reasons():
    names = {name.lower() for name in IDS}
    assert set(anatomy.single()) <= names and all(anatomy.single().values())


def test_a_real_scan_has_few_warnings(shared):
    folder = shared / "data" / "totalsegmentator_example"
    volume = nifti.load_ct(folder / "example_ct.nii.gz")
    labels = nifti.load_labels(folder / "example_seg.nii.gz", on=volume)
    warnings = found(volume, labels.array)
    assert not [w for w in warnings if w[0] in ("side", "order", "gap")], warnings
