import dataclasses
import subprocess
import sys

import pytest

from swinsmt_jax import SwinSMTConfig, config
from swinsmt_jax.checks import UserError
from swinsmt_jax.models.unetr import UNETRConfig
from swinsmt_jax.models.ux_net import UXNetConfig

MODEL = {
    "name": "swin_smt",
    "in_channels": 1,
    "out_channels": 118,
    "feature_size": 12,
    "num_experts": 4,
    "num_moe_stages": 3,
}
EXPERIMENT = {
    "model": MODEL,
    "data": {"root": "data", "patch_shape": [64, 64, 64], "batch_size": 2},
    "optimizer": {"learning_rate": 1e-3},
    "training": {"num_steps": 10},
}


def changed(key, value):
    values = {k: dict(v) for k, v in EXPERIMENT.items()}
    group, _, name = key.partition(".")
    values.setdefault(group, {})[name] = value
    return values


def test_a_config_survives_the_way_through_a_dictionary():
    experiment = config.from_config_dict(EXPERIMENT)
    assert config.from_config_dict(config.to_dict(experiment)) == experiment
    assert experiment.data.patch_shape == (64, 64, 64)
    assert config.model_from_dict(config.to_dict(experiment.model)) == experiment.model


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("model.num_expert", 4, "unknown config key model.num_expert.*'num_experts'"),
        ("model.name", "swin", "model.name is 'swin'"),
        (
            "model.nam",
            "swin_smt",
            "unknown config key model.nam; .*Did you mean 'name'",
        ),
        ("model.feature_size", 10, "stage 1 has 10 channels, which 3 attention heads"),
        ("model.feature_size", "12", "is .12., but must be a whole number"),
        ("model.num_experts", 0, "num_experts is 0, but must be a whole number"),
        ("model.num_moe_stages", 5, "whole number from 1 to 4"),
        ("model.patch_merging", "octant", "Did you mean 'octants'"),
        ("model.dtype", "float16", "must be one of 'float32', 'bfloat16'"),
        ("model.window_size", (7, 7), "must have 3 entries"),
        ("model.dropout", 1.5, r"must lie in \[0, 1\]"),
        ("model.remat", ("stage5",), "stage5"),
        ("model.in_channels", 2, "a CT has 1 channel"),
        ("data.batch_size", 0, "batch_size is 0 and data.batch_per_device 0, but"),
        ("data.patch_shape", [64, 64], "must have 3 sides"),
        ("data.patch_shape", [64, 100, 64], r"next valid shape is \(64, 128, 64\)"),
        ("data.hu_range", (1.0, 0.0), "low < high"),
        ("optimizer.learning_rate", 0.0, "must be positive"),
        ("optimizer.clip_norm", 0.0, "must be positive; a large value"),
        ("optimizer.layer_decay", 0.0, r"must lie in \(0, 1\]"),
        ("optimizer.freeze", ("(",), "freeze .* is '\\(', which is not a regular expr"),
        ("optimizer.warmup_steps", 11, "only training.num_steps = 10"),
        *(
            ("data.classes", (name,), "data.classes .* must be the plain name of a")
            for name in ("/tmp/ct", "../ct", "a/b", "a\\b", "..", "", "x\n", "\x1b[1m")
        ),
        ("data.classes", ("x" * 201,), "at most 200 bytes"),
        ("training.num_steps", 0, "num_steps is 0"),
        (
            "training.accumulate",
            3,
            r"must divide data.batch_size = 2: take one of 1, 2",
        ),
        ("training.ema_decay", 1.0, r"must lie in \[0, 1\); 0 keeps no average"),
        ("training.seed", -1, "seed is -1, but must lie in"),
        ("mesh.data", 0, "at least 1, or -1"),
        ("mesh.expert", 3, "must divide model.num_experts = 4: take one of 1, 2, 4"),
        ("inference.blend", "gauss", "Did you mean 'gaussian'"),
        ("inference.overlap", 1.0, r"must lie in \[0, 1\)"),
    ],
)
def test_a_bad_value_is_named_with_its_rule(key, value, words):
    with pytest.raises(UserError, match=words):
        config.from_config_dict(changed(key, value))


def test_an_earlier_key_is_read_and_told(caplog):
    with caplog.at_level("INFO", logger="absl"):
        found = config.from_config_dict(changed("inference.accumulate", "host"))
    assert found.inference.accumulate_on == "host"
    assert "accumulate is now accumulate_on" in caplog.text


def test_layer_decay_needs_encoder_stages():
    model = {"name": "unetr", "in_channels": 1, "out_channels": 2, "img_size": 64}
    values = changed("optimizer.layer_decay", 0.8)
    assert config.from_config_dict(values).optimizer.layer_decay == 0.8
    with pytest.raises(UserError, match="layer_decay is 0.8, but this network has no"):
        config.from_config_dict(values | {"model": model})


def test_a_group_is_no_value():
    with pytest.raises(UserError, match="config key data must be a group of keys"):
        config.from_config_dict(EXPERIMENT | {"data": 3})


def test_configs_load_no_jax():
    """The processes that make crops import them."""
    code = "import sys, swinsmt_jax.config; sys.exit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_a_missing_key_is_named():
    values = changed("model.num_experts", 4)
    del values["model"]["num_experts"]
    with pytest.raises(UserError, match="config key model.num_experts is missing"):
        config.from_config_dict(values)


def test_a_dtype_of_numpy_or_jax_is_taken():
    import jax.numpy as jnp

    model = config.from_config_dict(EXPERIMENT).model
    assert dataclasses.replace(model, dtype=jnp.bfloat16).dtype == "bfloat16"


SWIN = dict(in_channels=1, out_channels=2, feature_size=12)
OTHER = dict(in_channels=1, out_channels=2)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"window_size": 7.0}, "model.window_size is 7.0, but must be a whole number"),
        ({"window_size": None}, "model.window_size is None, but must be a sequence"),
        ({"window_size": (7, 7.0, 7)}, r"an entry of model.window_size \(7, 7.0, 7\)"),
        ({"depths": 2}, "model.depths is 2, but must be a sequence"),
        ({"num_heads": 3}, "model.num_heads is 3, but must be a sequence"),
        ({"mlp_ratio": "a"}, "model.mlp_ratio is 'a', but must be a finite number"),
        ({"mlp_ratio": float("nan")}, "model.mlp_ratio is nan, but must be a finite"),
        ({"mlp_ratio": 0.05}, "model.mlp_ratio is 0.05, .* no hidden .* least 0.0833"),
        ({"residual_conv": "yes"}, "residual_conv is 'yes', but must be True or False"),
        ({"normalize": 1}, "model.normalize is 1, but must be True or False"),
        ({"num_moe_stages": True}, "model.num_moe_stages is True, but must be a whole"),
        ({"remat": "stage1"}, "model.remat is 'stage1', but must be a sequence"),
        ({"dropout": "a"}, "model.dropout is 'a', but must be a finite number"),
    ],
)
def test_a_swin_config_made_by_hand_is_checked_too(options, words):
    options = {"num_experts": 2, "num_moe_stages": 1, **options}
    with pytest.raises(UserError, match=words):
        SwinSMTConfig(**SWIN, **options)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: UNETRConfig(**OTHER, img_size=128.0), "model.img_size is 128.0, but"),
        (
            lambda: UXNetConfig(**OTHER, layer_scale_init_value="a"),
            "layer_scale_init_value is 'a', but must be a finite number",
        ),
        (lambda: config.MeshConfig(1.5, 1), "mesh.data is 1.5, but must be a whole"),
        (
            lambda: config.OptimizerConfig(1e-3, freeze="encoder"),
            "optimizer.freeze is 'encoder', but must be a sequence",
        ),
        (
            lambda: config.TrainingConfig(3, ema_decay="a"),
            "training.ema_decay is 'a', but must be a finite number",
        ),
        (
            lambda: config.InferenceConfig(overlap=None),
            "inference.overlap is None, but must be a finite number",
        ),
        (
            lambda: config.DataConfig("data", patch_shape=64, batch_size=1),
            "data.patch_shape is 64, but must be a sequence",
        ),
    ],
)
def test_a_config_made_by_hand_is_checked_too(make, words):
    with pytest.raises(UserError, match=words):
        make()


def test_few_tokens_are_enough_for_learned_slots():
    values = changed("model.num_experts", 65)
    with pytest.raises(UserError, match="64 tokens in the last stage"):
        config.from_config_dict(values)
    values["model"] |= {"slots": "learned", "slots_per_expert": 1}
    assert config.from_config_dict(values).model.num_experts == 65
