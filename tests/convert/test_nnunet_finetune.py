"""A training that begins with a model folder of nnU-Net, and what comes of it."""

import json
import sys
from types import SimpleNamespace

import nibabel as nib
import numpy as np
import pytest
from absl import flags
from flax import nnx

from swinsmt_jax import load, load_nnunet, models
from swinsmt_jax.checks import UserError
from swinsmt_jax.commands import evaluate, inspect, predict, preprocess, train
from swinsmt_jax.config import to_dict
from swinsmt_jax.configs import nnunet_finetune as config_file
from swinsmt_jax.convert import command as conversion
from swinsmt_jax.convert import nnunet_finetune, nnunet_folder, nnunet_writer, to_torch
from swinsmt_jax.convert.starting_point import start_from
from swinsmt_jax.inference import export, portable
from swinsmt_jax.models.nnunet import PlainConvUNetConfig
from swinsmt_jax.phantoms.dataset import write_dataset
from swinsmt_jax.runtime import distributed, startup
from swinsmt_jax.training.checkpoint import load_model

pytestmark = pytest.mark.filterwarnings("ignore:.*load_module:DeprecationWarning")
NETWORK = PlainConvUNetConfig(
    **{"in_channels": 1, "out_channels": 4, "features_per_stage": (4, 6)},
    **{"strides": (1, (2, 2, 1)), "kernel_sizes": ((3, 3, 1), 3)},
    n_conv_per_stage=1,
    n_conv_per_stage_decoder=1,
)
NAMES = ("background", "liver", "brain", "kidney left")
SPACING = (12.0, 12.0, 24.0)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a model folder, phantoms, and a store of two of their classes."""
    root = tmp_path_factory.mktemp("finetune")
    nnunet_writer.write(
        root / "Dataset001_X",
        models.create(NETWORK, rngs=nnx.Rngs(7)),
        **{"patch_shape": (16, 12, 10), "spacing": SPACING, "batch_size": 2},
        **{"clip": (-900, 700), "mean": 90.0, "std": 210.5, "names": NAMES},
    )
    write_dataset(root / "data", train=2, val=1, test=1, spacing=12, seed=0)
    command(
        preprocess,
        *(f"--source={root / 'data'}", f"--store={root / 'store'}"),
        *("--classes=kidney_left,liver,spleen", f"--nnunet={root / 'Dataset001_X'}"),
    )
    return root


def command(module, *arguments):
    """Run a command's main with flags of its own."""
    values = flags.FlagValues()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [module.__name__, *arguments])
        if module is not inspect:
            module.define_flags(values)
        rest = startup.parse([module.__name__, *arguments], values)
        if module is not inspect:
            patch.setattr(module, "flags", SimpleNamespace(FLAGS=values))
        patch.setattr(distributed, "start", lambda *_: None)
        module.main(rest)


def planned(root, **data):
    values = config_file.get_config()
    values.data.update({"root": str(root / "store"), **data})
    return nnunet_finetune.planned(values, str(root / "Dataset001_X"))


def test_the_plan_and_the_data_say_what_the_config_leaves_out(place):
    found = planned(place)
    data, model = found.data, to_dict(found.model)
    assert data.patch_shape == (16, 12, 10) and data.spacing == SPACING
    assert data.hu_range == (-900, 700) and data.normalization == (90.0, 210.5)
    assert data.batch_size == 2 and found.inference.convention == "nnunet"
    for key in ("features_per_stage", "strides", "kernel_sizes"):
        assert model[key] == to_dict(NETWORK)[key]
    assert model["out_channels"] == 4 and model["dtype"] == "bfloat16"
    assert planned(place, patch_shape=(32, 16, 10)).data.patch_shape == (32, 16, 10)


def test_outputs_of_common_classes_are_kept_by_name(place):
    """Whatever their order; a case of letters and a blank make no other class."""
    model = models.create(NETWORK, rngs=nnx.Rngs(1))
    fresh = to_torch(model)
    folder = nnunet_folder.read(place / "Dataset001_X")
    theirs, _ = nnunet_folder.start_of(folder.path)
    names = ("background", "Kidney_left", "liver", "spleen")
    report = start_from(place / "Dataset001_X", names=names)(model)
    assert "outputs kept by name: Kidney_left, liver; newly" in str(report)
    assert "newly initialised: spleen" in str(report)
    for name, array in to_torch(model).items():
        if "seg_layers" not in name:
            np.testing.assert_array_equal(array, theirs[name])
            continue
        for own, their in ((0, 0), (1, 3), (2, 1)):
            np.testing.assert_array_equal(array[own], theirs[name][their])
        np.testing.assert_array_equal(array[3], fresh[name][3])


def test_regions_are_no_classes(place, tmp_path):
    """Sigmoids that overlap: the encoder is kept, and all outputs are new."""
    folder = nnunet_writer.write(
        tmp_path / "Dataset002_R",
        models.create(NETWORK, rngs=nnx.Rngs(7)),
        **{"patch_shape": (16, 12, 10), "spacing": SPACING, "batch_size": 2},
        **{"clip": (-900, 700), "mean": 90.0, "std": 210.5, "names": NAMES},
    )
    file = folder / "dataset.json"
    content = json.loads(file.read_text())
    regions = {"all": [1, 2], "liver": [2, 3], "x": 3, "y": 4}
    content["labels"] = {"background": 0, **regions}
    content["regions_class_order"] = [1, 2, 3, 4]
    file.write_text(json.dumps(content))
    model = models.create(NETWORK, rngs=nnx.Rngs(1))
    fresh = to_torch(model)
    theirs, _ = nnunet_folder.start_of(folder)
    report = start_from(folder, names=("background", "liver", "x", "y"))(model)
    assert "outputs kept by name: none" in str(report)
    for name, array in to_torch(model).items():
        expected = fresh if "seg_layers" in name else theirs
        np.testing.assert_array_equal(array, expected[name])


def test_what_does_not_agree_is_refused_before_the_first_step(place, tmp_path):
    store = tmp_path / "other"
    command(
        preprocess,
        *(f"--source={place / 'data'}", f"--store={store}", "--spacing=12"),
        "--classes=liver",
    )
    workdir = f"--workdir={tmp_path / 'run'}"
    given = ["--config=configs/nnunet_finetune.py", workdir, "--config.mesh.data=1"]
    for more, words in (
        ([], "--start_from is None; give a folder"),
        ([f"--start_from={place / 'store'}"], "give a folder such as"),
        (
            [f"--start_from={place / 'Dataset001_X'}", f"--config.data.root={store}"],
            "data.spacing is 12,12,24, but the store .* --spacing=12; set data.spa",
        ),
    ):
        with pytest.raises(UserError, match=words) as error:
            command(train, *given, *more)
        assert "\n" not in str(error.value)
    folder = nnunet_folder.find(place / "Dataset001_X")
    copy = tmp_path / "copy"
    copy.mkdir()
    (copy / "fold_0").symlink_to(folder / "fold_0")
    (copy / "dataset.json").symlink_to(folder / "dataset.json")
    plans = (folder / "plans.json").read_text()
    (copy / "plans.json").write_text(plans.replace("CTNorm", "ZScoreNorm"))
    with pytest.raises(UserError, match="by its own voxels .ZScoreNormalization."):
        command(train, *given, f"--start_from={copy}")


def test_a_fine_tuned_run_is_one_like_any(place, tmp_path, rng, caplog, capsys):
    """It trains, continues, is evaluated, predicts, and becomes a folder again."""
    run, folder = tmp_path / "run", place / "Dataset001_X"
    arguments = [
        *("--config=configs/nnunet_finetune.py", f"--workdir={run}"),
        *(f"--start_from={folder}", f"--config.data.root={place / 'store'}"),
        *("--config.training.num_steps=2", "--config.optimizer.warmup_steps=1"),
        *("--config.training.eval_every=0", "--config.model.dtype=float32"),
        *("--config.mesh.data=1", "--config.model.remat=()"),
    ]
    with caplog.at_level("INFO", logger="absl"):
        command(train, *arguments)
    assert "outputs kept by name: kidney_left, liver; newly init" in caplog.text
    config, model, info = load_model(run)
    assert info["step"] == 2 and config.data.spacing == SPACING
    command(evaluate, f"--workdir={run}", "--surface_tolerance=0", "--limit=1")
    (case,) = json.loads((run / "eval_test/results.json").read_text())["cases"]
    scan = place / "data" / case / "ct.nii.gz"
    out = tmp_path / "out"
    command(predict, f"--workdir={run}", f"--input={scan}", f"--output={out}")
    command(export, f"--workdir={run}", f"--output={tmp_path / 'network.npz'}")
    assert portable.load(tmp_path / "network.npz").about["spacing"] == list(SPACING)
    target = tmp_path / "Dataset009_Back"
    arguments = [f"--workdir={run}", "--to=nnunet", f"--output={target}"]
    command(conversion, *arguments)
    back = nnunet_folder.read(target)
    assert back.plan.names == ("background", "spleen", "kidney_left", "liver")
    for name, array in nnunet_folder.start_of(target)[0].items():
        np.testing.assert_array_equal(array, to_torch(model)[name])
    command(inspect, str(back.path))
    assert "voxels 12,12,24 mm" in capsys.readouterr().out
    assert list(out.glob("*.nii.gz"))
    # Without air and at the network's spacing both see the same voxels.
    hu = rng.integers(-800, 600, (25, 20, 14)).astype(np.int16)
    turned = np.diag([-12.0, 12, 24, 1])[[1, 0, 2, 3]]
    nib.save(nib.Nifti1Image(hu, turned), tmp_path / "scan.nii.gz")
    ours = load(run).segment(tmp_path / "scan.nii.gz")
    theirs = load_nnunet(target).segment(tmp_path / "scan.nii.gz")
    assert len(np.unique(ours)) > 1
    assert np.count_nonzero(ours != theirs) <= 2
