import dataclasses

import pytest

from swinsmt_jax import config
from swinsmt_jax.checks import UserError

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
        ("model.feature_size", 10, "stage 1 has 10 channels, which 3 attention heads"),
        ("model.feature_size", "12", "must be of type int"),
        ("model.num_experts", 0, "num_experts is 0, but must be a whole number"),
        ("model.num_moe_stages", 5, "whole number from 1 to 4"),
        ("model.patch_merging", "octant", "Did you mean 'octants'"),
        ("model.dtype", "float16", "must be one of 'float32', 'bfloat16'"),
        ("model.window_size", (7, 7), "must have 3 entries"),
        ("model.dropout", 1.5, r"must lie in \[0, 1\]"),
        ("model.remat", ("stage5",), "stage5"),
        ("data.patch_shape", [64, 100, 64], r"next valid shape is \(64, 128, 64\)"),
        ("data.hu_range", (1.0, 0.0), "low < high"),
        ("optimizer.learning_rate", 0.0, "must be positive"),
        ("optimizer.warmup_steps", 11, "only training.num_steps = 10"),
        ("training.num_steps", 0, "num_steps is 0"),
        ("mesh.data", 0, "at least 1, or -1"),
        ("inference.overlap", 1.0, r"must lie in \[0, 1\)"),
    ],
)
def test_a_bad_value_is_named_with_its_rule(key, value, words):
    with pytest.raises(UserError, match=words):
        config.from_config_dict(changed(key, value))


def test_a_missing_key_is_named():
    values = changed("model.num_experts", 4)
    del values["model"]["num_experts"]
    with pytest.raises(UserError, match="config key model.num_experts is missing"):
        config.from_config_dict(values)


def test_a_dtype_of_numpy_or_jax_is_taken():
    import jax.numpy as jnp

    model = config.from_config_dict(EXPERIMENT).model
    assert dataclasses.replace(model, dtype=jnp.bfloat16).dtype == "bfloat16"
