"""Probabilities beside labels: of each voxel, by structure, and in files."""

import csv
import json
from dataclasses import replace

import jax
import jax.numpy as jnp
import nibabel as nib
import numpy as np
import pytest
from scipy import ndimage

from swinsmt_jax.checks import UserError
from swinsmt_jax.config import from_config_dict
from swinsmt_jax.inference.grid import Decision
from swinsmt_jax.inference.outputs import OutputOptions
from swinsmt_jax.inference.scans import find_scans, segment_scans
from swinsmt_jax.inference.segmenter import Segmenter
from swinsmt_jax.inference.sliding_window import decide, sliding_window

WINDOW = (8, 6, 4)
CLASSES = 4
KEPT = Decision(confidence=True, chosen=(2, 1))


@jax.jit
def mixed(x):
    """Three classes of a voxel and of the window that sees it."""
    mean = x.mean((1, 2, 3), keepdims=True)
    return jnp.concatenate([x, 2 * x**2 + 10 * (mean - 0.5), 1 - x], axis=-1)


def require_equal(decided, probabilities):
    """Compare with what a naive look at all probabilities [..., K] gives."""
    ordered = np.sort(probabilities, axis=-1)
    labels = probabilities.argmax(-1)
    np.testing.assert_array_equal(decided.labels, labels)
    np.testing.assert_allclose(decided.probability, ordered[..., -1], atol=5e-4)
    margin = ordered[..., -1] - ordered[..., -2]
    sure = np.abs(margin - 0.1) > 1e-4
    np.testing.assert_array_equal(decided.close[sure], (margin < 0.1)[sure])
    assert 0 < decided.close.mean() < 1
    assert decided.chosen.dtype == np.uint8
    np.testing.assert_allclose(
        decided.chosen / 255, probabilities[..., [2, 1]], atol=0.51 / 255
    )


@pytest.mark.parametrize("accumulate", ["host", "device"])
def test_probabilities_are_the_softmax_of_the_averaged_logits(rng, accumulate):
    volume = rng.random((21, 11, 9, 1), dtype=np.float32)
    options = dict(window=WINDOW, num_classes=3, window_batch=2)
    found = decide(mixed, volume, **options, accumulate=accumulate, decision=KEPT)
    logits = sliding_window(mixed, volume, **options)
    require_equal(found, np.asarray(jax.nn.softmax(logits)))


@pytest.mark.parametrize("accumulate", ["host", "device"])
def test_on_another_grid_probabilities_are_interpolated(rng, accumulate):
    shape = (13, 11, 9)
    volume = rng.random((*shape, 1), dtype=np.float32)
    options = dict(window=WINDOW, num_classes=3, window_batch=2)
    places = [0.6 * np.arange(int(n / 0.6)) - 0.2 for n in shape]
    options |= {"positions": places, "accumulate": accumulate}
    found = decide(mixed, volume, **options, decision=KEPT)
    del options["positions"], options["accumulate"]
    share = jax.nn.softmax(sliding_window(mixed, volume, **options))
    points = np.meshgrid(*places, indexing="ij")
    between = [
        ndimage.map_coordinates(p, points, order=1, mode="nearest")
        for p in np.moveaxis(np.asarray(share), -1, 0)
    ]
    require_equal(found, np.stack(between, axis=-1))


def test_of_overlapping_regions_the_flip_of_a_channel_is_the_second_class():
    share = np.array([[0.9, 0.2], [0.9, 0.52], [0.52, 0.9], [0.3, 0.1], [0.9, 0.47]])
    logits = np.float32(np.log(share / (1 - share)))
    kept = Decision("logits", (2, 1), confidence=True, chosen=(1,))
    found = kept.decide(np, logits, logits=True)
    assert found.labels.tolist() == [2, 1, 1, 0, 2]
    np.testing.assert_allclose(
        found.probability, [0.8, 0.52, 0.9, 0.7, 0.53], atol=1e-3
    )
    assert found.close.tolist() == [False, True, False, False, True]
    np.testing.assert_allclose(found.chosen[:, 0] / 255, share[:, 1], atol=2e-3)


@pytest.mark.parametrize("accumulate", ["host", "device"])
def test_one_vs_all_has_a_sigmoid_of_each_class_and_the_same_labels(rng, accumulate):
    volume = rng.random((21, 11, 9, 1), dtype=np.float32)
    options = dict(window=WINDOW, num_classes=3, window_batch=2)
    kept = KEPT._replace(one_vs_all=True)
    found = decide(mixed, volume, **options, accumulate=accumulate, decision=kept)
    logits = np.asarray(sliding_window(mixed, volume, **options))
    share = np.asarray(jax.nn.sigmoid(logits[..., 1:] - logits[..., :1]))
    rest = 1 - share.max(-1, keepdims=True)
    require_equal(found, np.concatenate([rest, share], axis=-1))
    softmax = decide(mixed, volume, **options, accumulate=accumulate)
    np.testing.assert_array_equal(found.labels, softmax.labels)
    assert len(np.unique(found.labels)) == 3


def test_one_vs_all_of_interpolated_classes_is_their_share_beside_the_background():
    kept = Decision(one_vs_all=True, confidence=True, chosen=(0, 1, 2))
    softmax = np.float32([[0.5, 0.25, 0.25], [0.1, 0.3, 0.6], [0, 1, 0]])
    found = kept.decide(np, softmax, logits=False)
    assert found.labels.tolist() == [0, 2, 1]
    wanted = [[2 / 3, 1 / 3, 1 / 3], [1 / 7, 3 / 4, 6 / 7], [0, 1, 0]]
    np.testing.assert_allclose(found.chosen / 255, wanted, atol=0.51 / 255)
    np.testing.assert_allclose(found.probability, [2 / 3, 6 / 7, 1], atol=1e-3)
    assert found.close.tolist() == [False, False, False]
    sure = np.float32([[0, 300, -300], [300, 0, 0]])
    found = kept.decide(np, sure, logits=True)
    assert found.chosen.tolist() == [[0, 255, 0], [255, 0, 0]]


def test_the_loss_of_the_training_says_what_a_probability_is(caplog):
    config = segmenter().config

    def of(loss):
        training = replace(config.training, loss=loss)
        return replace(segmenter(), config=replace(config, training=training)).decision

    assert of("one_vs_all").one_vs_all and not of("dice_ce").one_vs_all
    assert not of("of_my_own").one_vs_all
    assert "'of_my_own' is not registered here" in caplog.text


def test_what_is_not_asked_for_is_not_kept(rng):
    volume = rng.random((9, 7, 5, 1), dtype=np.float32)
    found = decide(mixed, volume, window=WINDOW, num_classes=3)
    assert found[1:] == (None, None, None)


@jax.jit
def by_brightness(windows):
    """Logits that are surest in the middle of each quarter of the grey levels."""
    return -8 * jnp.abs(windows * CLASSES - 0.5 - jnp.arange(CLASSES))


def segmenter(spacing=0.0):
    model = {"name": "swin_unetr", "in_channels": 1, "out_channels": CLASSES}
    config = {
        "model": model | {"feature_size": 12},
        "data": {
            **{"root": "nowhere", "patch_shape": (32, 32, 32), "batch_size": 1},
            **{"spacing": spacing, "hu_range": (0.0, 1000.0)},
        },
        "optimizer": {"learning_rate": 1e-3},
        "training": {"num_steps": 1},
    }
    return Segmenter(from_config_dict(config), by_brightness, 1)


@pytest.fixture
def scan(tmp_path, rng):
    """Two sure structures and, at the border between two grey levels, an unsure one."""
    hu = np.full((12, 14, 10), 125, np.int16)
    hu[:4], hu[6:9], hu[9:] = 375, 625, 875
    hu[6:7] = 740 + rng.integers(0, 20, (1, 14, 10))
    affine = np.array([[0, -2.0, 0, 5], [1.5, 0, 0, 7], [0, 0, 3, 9], [0, 0, 0, 1]])
    nib.save(nib.Nifti1Image(hu, affine), tmp_path / "a.nii.gz")
    return tmp_path / "a.nii.gz", hu


def predict(scan, output, **options):
    found = segment_scans(
        segmenter(), find_scans([scan]), output, OutputOptions(**options)
    )
    assert "error" not in found["a"], found
    return found["a"]


def test_statistics_say_how_sure_each_structure_is(tmp_path, scan):
    file, hu = scan
    out = tmp_path / "out"
    options = {"confidence": True, "statistics": True, "statistics_json": True}
    predict(file, out, **options, probabilities=("spleen", "kidney_left"))
    logits = -8 * np.abs(hu[..., None] / 250 - 0.5 - np.arange(CLASSES))
    share = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    first, second = np.sort(share, -1)[..., [-1, -2]].transpose(3, 0, 1, 2)
    with (out / "a_statistics.csv").open() as table:
        rows = {row["class"]: row for row in csv.DictReader(table)}
    told = json.loads((out / "a_statistics.json").read_text())["structures"]
    for number, (name, row) in enumerate(rows.items(), start=1):
        own = share.argmax(-1) == number
        wanted = {
            "mean_probability": first[own].mean(),
            "p5_probability": np.percentile(first[own], 5),
            "share_within_0.1_of_second": (first - second < 0.1)[own].mean(),
        }
        for key, value in wanted.items():
            assert float(row[key]) == pytest.approx(value, abs=2e-3), (name, key)
            assert told[name][key] == float(row[key])
    assert float(rows["spleen"]["share_within_0.1_of_second"]) == 0
    assert float(rows["kidney_right"]["share_within_0.1_of_second"]) > 0.02
    images = {f.name: nib.load(f) for f in (out / "a_probabilities").iterdir()}
    assert set(images) == {"spleen.nii.gz", "kidney_left.nii.gz"}
    for number, name in ((1, "spleen"), (3, "kidney_left")):
        image = images[f"{name}.nii.gz"]
        assert image.get_data_dtype() == np.uint8
        np.testing.assert_allclose(image.affine, nib.load(file).affine)
        np.testing.assert_allclose(
            image.get_fdata(), share[..., number], atol=0.52 / 255
        )


def test_labels_that_are_there_do_not_tell_probabilities(tmp_path, scan):
    file, _ = scan
    out = tmp_path / "out"
    predict(file, out, statistics=True)
    before = (out / "a_statistics.csv").read_bytes()
    for options, words in (
        ({"confidence": True}, "a_statistics.csv as --confidence asks.*--overwrite"),
        ({"probabilities": ("spleen",)}, "a_probabilities as --probabilities asks"),
    ):
        with pytest.raises(UserError, match=words):
            predict(file, out, **options)
    assert (out / "a_statistics.csv").read_bytes() == before
    predict(file, out, confidence=True, probabilities=("spleen",), overwrite=True)
    assert "mean_probability" in (out / "a_statistics.csv").read_text()
    again = predict(file, out, confidence=True, probabilities=("spleen",))
    assert "seconds" not in again  # all is there
    with pytest.raises(UserError, match="a class of probabilities is 'splen'"):
        predict(file, tmp_path / "other", probabilities=("splen",))


def test_a_run_that_lost_its_statistics_makes_them_again(tmp_path, scan, monkeypatch):
    """Labels are written last, so that a killed run leaves none without the rest."""
    from swinsmt_jax.data import nifti

    file, _ = scan

    def fail(*arguments, **options):
        raise OSError("no space left")

    with monkeypatch.context() as patched:
        patched.setattr(nifti, "save_labels", fail)
        found = segment_scans(
            *(segmenter(), find_scans([file]), tmp_path / "out"),
            OutputOptions(confidence=True),
        )
    assert "error" in found["a"]
    assert (tmp_path / "out/a_statistics.csv").exists()
    assert "seconds" in predict(file, tmp_path / "out", confidence=True)
