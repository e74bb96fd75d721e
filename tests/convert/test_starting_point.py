import dataclasses
import functools
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
    """The function that makes a network; its initial values are computed once."""

    @functools.cache
    def create(classes, seed):
        config = SwinUNETRConfig(1, classes, 12, depths=(1, 1, 1, 1), window_size=4)
        return models.create(config, rngs=nnx.Rngs(seed))

    def model(*, classes=3, seed=0):
        return nnx.clone(create(classes, seed))

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


@pytest.mark.parametrize(
    "prefix", ["net.", "model.", "module.", "_orig_mod.", "module._orig_mod.net."]
)
def test_one_prefix_of_all_names_is_left_out_and_named(make, other, prefix, caplog):
    weights = {prefix + name: array for name, array in other.items()}
    model = make(classes=5)
    with caplog.at_level("INFO", logger="absl"):
        convert.load_torch(model, weights)
    assert f"the prefix {prefix!r} of the weights was left out" in caplog.text
    for name, array in convert.to_torch(model).items():
        np.testing.assert_array_equal(array, other[name])
    report = convert.load_what_fits(make(classes=5, seed=2), weights)
    assert f"100% of the network's values; the prefix {prefix!r}" in str(report)


@pytest.mark.parametrize("prefix", ["swin_vit.", "encoder.", "module.encoder.", ""])
def test_an_encoder_is_found_below_another_prefix(make, other, prefix):
    encoder = {
        prefix + name.removeprefix("swinViT."): array
        for name, array in other.items()
        if name.startswith("swinViT.")
    }
    report = convert.load_what_fits(make(), {"head.weight": np.zeros(3), **encoder})
    assert len(report.loaded) == len(encoder)
    (unused,) = report.unused
    assert unused.endswith("head.weight")
    assert f"{prefix!r} of the weights was read as 'swinViT.'" in str(report)


def test_weights_of_which_little_fits_must_be_asked_for(make, other):
    config = SwinUNETRConfig(1, 3, 24, depths=(1, 1, 1, 1), window_size=4)
    wide = convert.to_torch(models.create(config, rngs=nnx.Rngs(0)))
    decoder = {n: a for n, a in other.items() if not n.startswith("swinViT.")}
    for weights, words in (
        (wide, r"have another width: \d+ of \d+ parameters .* of the network's values"),
        (decoder, "have only 0 of the 66 parameters of the encoder"),
    ):
        model = make()
        before = convert.to_torch(model)
        with pytest.raises(UserError, match=words) as told:
            convert.load_what_fits(model, weights)
        assert "--partial" in str(told.value) and "\n" not in str(told.value)
        after = convert.to_torch(model)
        assert all(np.array_equal(before[n], after[n]) for n in before)
        report = convert.load_what_fits(model, weights, partial=True)
        assert report.loaded and report.share < 1


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
    ("count", "classes", "given", "names"),
    [
        (2, (), (), {1: "class_1", 2: "class_2"}),
        (2, ("ear", "nose"), (), {1: "ear", 2: "nose"}),
        (2, (), ("ear", "left/nose"), {1: "ear", 2: "left_nose"}),
        (117, (), (), {5: "class_5"}),
        (117, (), ("v2",), {5: "liver"}),
        (117, (), ("total_v3",), {26: "vertebrae_L6"}),
    ],
)
def test_conversion_names_no_class_by_guess(
    make, tmp_path, experiment, count, classes, given, names
):
    files.write(tmp_path / "w.safetensors", convert.to_torch(make(classes=count + 1)))
    experiment = dataclasses.replace(
        experiment,
        data=dataclasses.replace(experiment.data, classes=classes),
        model=dataclasses.replace(experiment.model, out_channels=count + 1),
    )
    command.from_torch(
        experiment,
        weights=str(tmp_path / "w.safetensors"),
        workdir=str(tmp_path / "run"),
        partial=False,
        classes=given,
    )
    found = segmenter.load(tmp_path / "run").class_names
    assert len(found) == count and names.items() <= found.items()
    if "class_1" in found.values():
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
    words = "1 names are missing.*--partial loads what fits"
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
