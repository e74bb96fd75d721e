import dataclasses
import json
import re
import sys

import numpy as np
import pytest
from absl import flags
from flax import nnx

from swinsmt_jax import SwinUNETRConfig, convert, models
from swinsmt_jax.checks import UserError
from swinsmt_jax.config import from_config_dict
from swinsmt_jax.convert import command, files, starting_point
from swinsmt_jax.inference import segmenter
from swinsmt_jax.runtime import startup
from swinsmt_jax.training.checkpoint import load_model


@pytest.fixture(scope="module")
def make():
    def model(*, classes=3, seed=0):
        config = SwinUNETRConfig(1, classes, 12, depths=(1, 1, 1, 1), window_size=4)
        return models.create(config, rngs=nnx.Rngs(seed))

    return model


@pytest.fixture(scope="module")
def other(make):
    """The weights of a network with other classes."""
    return convert.to_torch(make(classes=5, seed=1))


def test_a_head_of_other_classes_stays_new_and_is_named(make, other):
    model = make()
    before = convert.to_torch(model)
    report = convert.load_what_fits(model, other)
    after = convert.to_torch(model)
    heads = {"out.conv.conv.weight", "out.conv.conv.bias"}
    assert set(report.other_shape) == heads and not report.missing and not report.unused
    for name, array in after.items():
        expected = before if name in heads else other
        np.testing.assert_array_equal(array, expected[name])
    words = "2 of another shape, so newly initialised: .*out.conv.conv.weight .5, 12"
    assert "newly initialised" in str(report)
    with pytest.raises(AssertionError, match=words):
        raise AssertionError(str(report))


def test_a_self_supervised_encoder_is_understood(make, other):
    encoder = {
        "module." + name.removeprefix("swinViT.").replace("linear", "fc"): array
        for name, array in other.items()
        if name.startswith("swinViT.")
    }
    encoder["module.rotation_head.weight"] = np.zeros((4, 4), np.float32)
    model = make()
    report = convert.load_what_fits(model, encoder)
    after = convert.to_torch(model)
    assert len(report.loaded) == len(encoder) - 1
    assert report.unused == ("swinViT.rotation_head.weight",)
    assert all(not name.startswith("swinViT.") for name in report.missing)
    for name in report.loaded:
        np.testing.assert_array_equal(after[name], other[name])


def test_weights_of_which_nothing_fits_are_refused(make):
    with pytest.raises(UserError, match="none of the 1 weights fits.*like w,"):
        convert.load_what_fits(make(), {"w": np.zeros(3)})


@pytest.fixture
def experiment():
    model = {"name": "swin_unetr", "in_channels": 1, "out_channels": 3}
    small = {"feature_size": 12, "depths": (1, 1, 1, 1), "window_size": 4}
    return from_config_dict(
        {
            "model": model | small,
            "data": {"root": "x", "patch_shape": (32,) * 3, "batch_size": 1},
            "optimizer": {"learning_rate": 1e-3},
            "training": {"num_steps": 1},
        }
    )


def test_a_converted_workdir_says_what_it_holds(
    make, tmp_path, experiment, capsys, caplog
):
    weights = tmp_path / "w.safetensors"
    given = convert.to_torch(make(seed=3), buffers=True)
    files.write(weights, given)
    arguments = {"weights": str(weights), "workdir": str(tmp_path / "run")}
    command.from_torch(experiment, **arguments, partial=False)
    own = len(convert.to_torch(make()))
    words = rf"^{own} parameters loaded, .*; {len(given) - own} buffers .* not needed"
    assert re.search(words, capsys.readouterr().out)
    (start,) = json.loads((tmp_path / "run" / "run.json").read_text())["starts"]
    assert start["weights"] == str(weights)
    _, model, _ = load_model(tmp_path / "run")
    for name, array in convert.to_torch(model).items():
        np.testing.assert_array_equal(array, given[name])
    with caplog.at_level("INFO", logger="absl"):
        report = starting_point.start_from(tmp_path / "run")(make(seed=4))
    assert len(report.loaded) == own and "weights of step 0 of" in caplog.text


@pytest.mark.parametrize(
    ("classes", "names"),
    [((), {1: "class_1", 2: "class_2"}), (("ear", "nose"), {1: "ear", 2: "nose"})],
)
def test_conversion_names_no_class_by_guess(make, tmp_path, experiment, classes, names):
    files.write(tmp_path / "w.safetensors", convert.to_torch(make()))
    data = dataclasses.replace(experiment.data, classes=classes)
    experiment = dataclasses.replace(experiment, data=data)
    arguments = {"weights": str(tmp_path / "w.safetensors"), "partial": False}
    command.from_torch(experiment, **arguments, workdir=str(tmp_path / "run"))
    assert segmenter.load(tmp_path / "run").class_names == names
    if not classes:
        with pytest.raises(UserError, match="classes without known names"):
            segmenter.load(tmp_path / "run", mirror=True)


def test_conversion_wants_a_name_for_every_class(tmp_path, experiment):
    data = dataclasses.replace(experiment.data, classes=("ear",))
    experiment = dataclasses.replace(experiment, data=data)
    with pytest.raises(UserError, match="has 1 names, but the network gives 2 classes"):
        command.from_torch(experiment, weights="", workdir="", partial=False)


def test_weights_that_lack_something_point_to_partial(make, tmp_path, experiment):
    given = convert.to_torch(make())
    given.pop("out.conv.conv.bias")
    files.write(tmp_path / "w.safetensors", given)
    words = "(?s)1 names are missing.*--partial takes what fits"
    with pytest.raises(UserError, match=words):
        command.from_torch(
            experiment,
            weights=str(tmp_path / "w.safetensors"),
            workdir=str(tmp_path / "run"),
            partial=False,
        )
    assert not (tmp_path / "run").exists()


@pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning")
@pytest.mark.parametrize(
    "arguments, words",
    [
        (["--config=none.py"], "none.py"),
        (["--config=configs/demo.py", "--config.optimzer.b1=1"], "group 'optimzer'"),
        (["--wokdir=x"], "Unknown command line flag 'wokdir'"),
    ],
)
def test_what_the_command_line_cannot_mean_is_refused(monkeypatch, arguments, words):
    monkeypatch.setattr(sys, "argv", ["convert", "from_torch", *arguments])
    values = flags.FlagValues()
    command.define_flags(values)
    with pytest.raises(UserError, match=words):
        startup.parse(sys.argv, values)
