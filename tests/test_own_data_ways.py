"""Whatever the data of the training and of the use, each way gives the same labels."""

import json
import re
from dataclasses import replace

import jax.numpy as jnp
import nibabel as nib
import numpy as np
import pytest
from absl import flags
from scipy import ndimage

from swinsmt_jax import load, save
from swinsmt_jax.commands import evaluate, inspect, plan
from swinsmt_jax.commands import preprocess as preprocess_command
from swinsmt_jax.config import DataConfig, InferenceConfig, from_config_dict
from swinsmt_jax.data import pipeline, store
from swinsmt_jax.data.preprocess import preprocess
from swinsmt_jax.data.resampling import resample
from swinsmt_jax.data.sample import foreground_box
from swinsmt_jax.evaluation.validation import known_classes, segment_case
from swinsmt_jax.inference import export, portable
from swinsmt_jax.inference.outputs import OutputOptions
from swinsmt_jax.inference.scans import find_scans, segment_scans
from swinsmt_jax.runtime import startup
from swinsmt_jax.training import loop
from swinsmt_jax.training.checkpoint import load_model

pytestmark = pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning")

CLASSES = ["liver", "spleen"]
SPACING = (6.0, 6.0, 8.0)  # of the store; scans have 4 mm
MODEL = {"name": "nnunet_plain", "in_channels": 1, "out_channels": 3}
MODEL |= {"features_per_stage": (4, 8), "strides": (1, 2), "dtype": "float32"}
MODEL |= {"n_conv_per_stage": 1, "n_conv_per_stage_decoder": 1}


def describe(root, classes):
    content = {"classes": classes, "image": "{case}.nii", "labels": "{case}_labels.nii"}
    splits = {"train": ["a"], "val": [], "test": ["b"]}
    (root / "dataset.json").write_text(json.dumps(content | {"splits": splits}))


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Two scans as they are, with their classes in another order, and in a store."""
    root = tmp_path_factory.mktemp("own")
    rng, affine = np.random.default_rng(0), np.diag([-4.0, 4, 4, 1])
    for folder in ("raw", "turned"):
        (root / folder).mkdir()
    for case in "ab":
        label = rng.integers(0, 3, (5, 4, 4)).repeat(7, 0).repeat(7, 1).repeat(7, 2)
        label = label[:30, :26, :24].astype(np.uint8)
        hu = (np.array([-900, 900, 0])[label] + rng.normal(0, 20, label.shape)).astype(
            np.int16
        )
        other = np.array([0, 2, 1], np.uint8)[label]
        for folder, ids in (("raw", label), ("turned", other)):
            nib.save(nib.Nifti1Image(hu, affine), root / folder / f"{case}.nii")
            image = nib.Nifti1Image(ids, affine)
            nib.save(image, root / folder / f"{case}_labels.nii")
    describe(root / "raw", CLASSES)
    describe(root / "turned", CLASSES[::-1])
    assert preprocess(root / "raw", root / "store", spacing=SPACING) == {}
    return root


def scores(run, *more):
    values = flags.FlagValues()
    evaluate.define_flags(values)
    output = run / "scores"
    values(["evaluate.py", f"--output={output}", "--metrics=dice", *more])
    if values.predictions:
        evaluate.evaluate_predictions(
            values.predictions and run / "out",
            root=values.data_root,
            split="test",
            output=output,
            **evaluate.scoring(values),
        )
    else:
        evaluate.evaluate(values)
    case = json.loads((output / "results.json").read_text())["cases"]["b"]
    return {name: case["dice"][name] for name in CLASSES}


@pytest.mark.slow
@pytest.mark.parametrize("trained_on", ["raw", "store"])
def test_every_way_gives_the_same_labels(data, tmp_path, trained_on, caplog):
    run = tmp_path / "run"
    values = {"root": str(data / trained_on), "patch_shape": (16,) * 3, "batch_size": 1}
    config = from_config_dict(
        {
            "model": MODEL,
            "data": values | {"num_threads": 1},
            "optimizer": {"learning_rate": 3e-2},
            "training": {"num_steps": 60},
            "mesh": {"data": 1},
        }
    )
    loop.train(config, workdir=run)
    segmenter = load(run)
    found = segmenter.config.data
    assert found.classes == tuple(CLASSES) and found.seen.fingerprint
    assert found.spacing == (0.0 if trained_on == "raw" else SPACING)

    # The scan itself: scores of the network, its files, and from Python.
    scan = data / "raw" / "b.nii"
    segment_scans(segmenter, find_scans([scan]), run / "out", OutputOptions())
    written = np.asarray(nib.load(run / "out" / "b.nii.gz").dataobj)
    np.testing.assert_array_equal(written, segmenter.segment(scan))
    raw = scores(run, f"--workdir={run}", f"--data_root={data / 'raw'}")
    files = f"--predictions={run / 'out'}"
    assert scores(run, files, f"--data_root={data / 'raw'}") == raw
    turned = f"--data_root={data / 'turned'}"  # by the names of classes
    assert scores(run, f"--workdir={run}", turned) == raw
    assert scores(run, files, turned) == raw

    # The store's grid: scores of the network, and the exported network.
    (case,) = store.find_cases(data / "store", split="test")
    stored = case.read()
    (raw_case,) = pipeline.find_cases(
        replace(found, root=str(data / "raw")), split="test"
    )
    own = raw_case.read()
    native = segmenter.segment_array(own.image, own.affine)
    labels = segmenter.segment_array(stored.image, stored.affine)
    truth = [stored.label == k for k in (1, 2)]
    dice = [
        2 * (own & (labels == k)).sum() / (own.sum() + (labels == k).sum())
        for k, own in enumerate(truth, start=1)
    ]
    on_store = scores(run, f"--workdir={run}", f"--data_root={data / 'store'}")
    np.testing.assert_allclose([on_store[name] for name in CLASSES], dice, atol=1e-6)
    far = "trained at scans' own spacings, from 4 x 4 x 4"
    if trained_on == "store":  # the same as labels of the scan brought to its grid
        there, _ = resample(native, own.affine, spacing=SPACING, order=0)
        expected = np.mean(dice_of(there, stored.label))
        assert expected > 0.8 and far not in caplog.text
        assert abs(np.mean(dice) - expected) < 0.005
        assert abs(np.mean(list(raw.values())) - expected) < 0.005
    else:
        assert min(raw.values()) > 0.9 and far in caplog.text
    export.export(load_model(run)[1], segmenter.config, run / "network.npz")
    network = portable.load(run / "network.npz")
    assert network.about["data"] == found.seen.fingerprint
    told = "\n".join(inspect.lines_of(run / "network.npz"))
    marked = "trained at scans' own spacings, from 4 to 4 mm" in told
    assert marked == (trained_on == "raw")
    image, wanted = own.image, native
    if trained_on == "store":
        image, wanted = stored.image, labels
    box = foreground_box(image, air=found.hu_range[0])
    np.testing.assert_array_equal(network.segment(image[box]), wanted[box])
    told = "\n".join(inspect.lines_of(run))
    assert "a run of nnunet_plain" in told and "liver, spleen" in told


def test_what_a_folder_is_is_said(data):
    told = "\n".join(inspect.lines_of(data / "store"))
    assert f"a store made of {data / 'raw'}" in told and "voxels 6,6,8 mm" in told
    told = "\n".join(inspect.lines_of(data / "raw"))
    assert "described by a JSON file" in told and "1 train, 0 val, 1 test" in told


def test_a_plan_proposes_commands_and_says_what_a_step_takes(data, tmp_path):
    told = plan.plan(str(data / "raw"))
    assert "4.00 x 4.00 x 4.00" in told and "--spacing=4" in told
    assert "--config.model.out_channels=3" in told and '"(32, 32, 32)"' in told
    assert "a step of nnunet_plain on 2 crops: 0.08" in told and "--measure" in told
    file = tmp_path / "mine.py"
    file.write_text(
        "from configs import nnunet_plain\n\n\ndef get_config():\n"
        "    config = nnunet_plain.get_config()\n"
        f"    config.model = {MODEL | {'out_channels': 9}}\n    return config\n"
    )
    told = plan.plan(str(data / "raw"), config=str(file), measure=True)
    assert f"--config={file}" in told and '"(30, 26, 24)"' in told
    assert re.search(
        r"one device of this machine: a step takes .* GB .* s to comp", told
    )


def test_a_store_takes_its_spacing_from_the_config_that_will_train(data, tmp_path):
    values = flags.FlagValues()
    preprocess_command.define_flags(values)
    file = tmp_path / "mine.py"
    file.write_text(
        "from configs import demo\n\n\ndef get_config():\n"
        "    config = demo.get_config()\n    config.data.spacing = (6.0, 6.0, 8.0)\n"
        "    return config\n"
    )
    given = [f"--source={data / 'raw'}", "--store=x", f"--config={file}"]
    startup.parse(["preprocess.py", *given], values)
    assert preprocess_command.spacing_of(values) == SPACING
    free = [*given[:2], "--config=demo", "--spacing=2"]  # takes the store's
    startup.parse(["preprocess.py", *free], values)
    assert preprocess_command.spacing_of(values) == 2.0
    startup.parse(["preprocess.py", *given, "--spacing=6"], values)
    with pytest.raises(ValueError, match="--spacing is 6, but .* is 6,6,8"):
        preprocess_command.spacing_of(values)


def test_a_network_and_data_of_other_classes_are_refused_with_both_lists(data):
    config = from_config_dict(
        {
            "model": MODEL,
            "data": {"root": str(data / "store"), "patch_shape": (16,) * 3}
            | {"batch_size": 1, "spacing": 2.0},
            "optimizer": {"learning_rate": 1e-3},
            "training": {"num_steps": 1},
        }
    )
    with pytest.raises(ValueError, match="data.spacing is 2, but .*--spacing=6,6,8"):
        pipeline.settled(config.data, num_classes=3)
    classes = pipeline.class_map(config.data)
    with pytest.raises(ValueError, match="no class spleen: .*; .* liver, spleen"):
        classes.ids_of(("background", "liver", "colon"), what="the network")
    table = classes.ids_of(("background", "colon", "Spleen", "liver"), what="it")
    assert table[:4].tolist() == [0, 0, 2, 1]


def one_hot(labels, ids=3):
    return np.eye(ids, dtype=np.float32)[labels]


def knowing(truth):
    """A predictor whose only window is the whole grid, and which knows its labels."""
    return lambda windows: 99 * jnp.asarray(one_hot(truth))[None]


def at(array, affine, *, on):
    """Labels [X, Y, Z] at the voxels of another sample, each class linearly."""
    places = np.indices(on.label.shape).reshape(3, -1)
    step = np.linalg.inv(affine) @ on.affine
    places = step[:3, :3] @ places + step[:3, 3:]
    shares = [
        ndimage.map_coordinates(part, places, order=1, mode="nearest")
        for part in np.moveaxis(one_hot(array), -1, 0)
    ]
    return np.argmax(shares, 0).reshape(on.label.shape)


def dice_of(labels, truth):
    ids = (1, 2)
    return [
        2
        * ((labels == k) & (truth == k)).sum()
        / ((labels == k).sum() + (truth == k).sum())
        for k in ids
    ]


@pytest.mark.parametrize("order", [CLASSES, CLASSES[::-1]])
def test_a_perfect_predictor_loses_nothing_but_by_resampling(data, order):
    """Also where its outputs are in another order than the classes of the data."""
    (stored_case,) = store.find_cases(data / "store", split="test")
    (raw_case,) = pipeline.find_cases(
        DataConfig(str(data / "raw"), (1, 1, 1), batch_size=1), split="test"
    )
    stored, raw = stored_case.read(), raw_case.read()
    ids = np.array([0, *(1 + order.index(name) for name in CLASSES)])
    config = DataConfig(
        *(str(data / "raw"), stored.label.shape),
        **{"batch_size": 1, "spacing": SPACING, "classes": tuple(order)},
    )
    known = known_classes(config, pipeline.class_map(config))
    found = {
        name: segment_case(
            knowing(ids[stored.label]),
            case,
            data=config,
            inference=InferenceConfig(),
            num_classes=3,
            to_data=known,
        )
        for name, case in (("store", stored_case), ("raw", raw_case))
    }
    assert found["store"].result.scores["dice"][1:].tolist() == [1, 1]
    # Of equal shares the first output wins, so ties follow the order of the outputs.
    there_and_back = ids[at(ids[stored.label], stored.affine, on=raw)]
    expected = dice_of(there_and_back, raw.label)
    assert 0.6 < min(expected) < 0.999
    np.testing.assert_allclose(
        found["raw"].result.scores["dice"][1:], expected, atol=1e-3
    )


@pytest.mark.parametrize("folder", ["raw", "turned"])
def test_files_of_the_truth_score_one(data, tmp_path, folder):
    """Also where they name their classes in another order than the data."""
    (tmp_path / "out").mkdir()
    ids = np.asarray(nib.load(data / folder / "b_labels.nii").dataobj)
    names = dict(enumerate(CLASSES if folder == "raw" else CLASSES[::-1], start=1))
    save(tmp_path / "out" / "b.nii.gz", ids, like=data / "raw" / "b.nii", names=names)
    files = (f"--predictions={tmp_path / 'out'}", f"--data_root={data / 'raw'}")
    assert set(scores(tmp_path, *files).values()) == {1}


def test_a_run_finds_its_description_from_any_folder(data, monkeypatch):
    monkeypatch.chdir(data)
    given = DataConfig("raw", (16,) * 3, 1, description="turned/dataset.json")
    found = pipeline.settled(given, num_classes=3)
    monkeypatch.chdir("/")
    assert pipeline.class_map(found).names[1:] == tuple(CLASSES[::-1])
    named = DataConfig("/", (16,) * 3, 1, description="v2")
    with pytest.raises(ValueError, match="meta.csv does not exist"):
        pipeline.settled(named, num_classes=118)
