import jax
import numpy as np
import pytest
from flax import nnx

from swinsmt_jax import SwinSMTConfig, convert, models
from swinsmt_jax.checks import UserError
from swinsmt_jax.models import registry
from swinsmt_jax.models.nnformer import NNFormerConfig
from swinsmt_jax.models.nnunet import PlainConvUNetConfig

CONFIG = SwinSMTConfig(
    in_channels=1, out_channels=2, feature_size=3, num_heads=(1, 1, 1, 1),
    depths=(1, 1, 1, 1), num_experts=2, num_moe_stages=1, window_size=(2, 3, 2),
    residual_conv=True, patch_norm=True,
)  # fmt: skip


@pytest.fixture(scope="module")
def params():
    return jax.jit(lambda: nnx.state(models.create(CONFIG, rngs=nnx.Rngs(0))))()


@pytest.fixture
def model(params):
    graphdef = nnx.graphdef(
        nnx.eval_shape(lambda: models.create(CONFIG, rngs=nnx.Rngs(0)))
    )
    return nnx.merge(graphdef, params)


@pytest.fixture
def state_dict(model, rng):
    shapes = convert.to_torch(model)
    return {k: rng.standard_normal(v.shape).astype("f4") for k, v in shapes.items()}


def test_a_state_dict_comes_back_bit_for_bit(model, state_dict):
    convert.load_torch(model, state_dict)
    written = convert.to_torch(model)
    assert written.keys() == state_dict.keys()
    for name, array in state_dict.items():
        np.testing.assert_array_equal(written[name], array)


def test_a_scalar_stays_a_scalar(model, state_dict):
    model.temperature = nnx.Param(jax.numpy.float32(2.5))
    written = convert.to_torch(model)
    assert written["temperature"].shape == ()
    convert.load_torch(model, state_dict | {"temperature": np.float32(0.5)})
    assert model.temperature[...] == 0.5 and model.temperature.shape == ()


def test_names_that_are_the_networks_own_are_kept():
    entry = registry.entry("nnformer")  # with fc1 and fc2, as MONAI's older Swin
    config = entry.config(in_channels=1, out_channels=2, **entry.tiny)
    graphdef, shapes = nnx.split(
        nnx.eval_shape(lambda: models.create(config, rngs=nnx.Rngs(0)))
    )
    model = nnx.merge(graphdef, jax.tree.map(lambda a: np.ones(a.shape, "f4"), shapes))
    report = convert.load_what_fits(model, convert.to_torch(model))
    assert not report.missing and not report.unused


def test_statistics_are_written_and_have_to_be_there():
    entry = registry.entry("repux_net")
    config = entry.config(in_channels=1, out_channels=2, **entry.tiny)
    graphdef, shapes = models.abstract_model(config)
    model = nnx.merge(graphdef, jax.tree.map(lambda a: np.ones(a.shape, "f4"), shapes))
    whole = convert.to_torch(model, buffers=True)
    counters = {name for name in whole if name.endswith("num_batches_tracked")}
    assert len(counters) == 4 and all(
        whole[name].dtype == np.int64 for name in counters
    )
    convert.load_torch(model, whole)
    assert not convert.load_what_fits(model, whole).unused
    parameters = {n: a for n, a in whole.items() if "running" not in n}
    message = "has all parameters, but lacks 8 buffers, such as .*running_mean"
    with pytest.raises(UserError, match=message) as found:
        convert.load_torch(model, parameters)
    assert "\n" not in str(found.value)


def test_expert_e_is_row_e(model, state_dict):
    convert.load_torch(model, state_dict)
    w1 = model.swinViT.layers4.blocks[0].mlp.experts.w1[...]
    name = "swinViT.layers4.0.blocks.0.mlp.experts.1.0.weight"
    np.testing.assert_array_equal(w1[1], state_dict[name].T)


def test_index_buffers_and_a_module_prefix_are_passed_over(model, state_dict):
    convert.load_torch(model, state_dict)
    full = convert.to_torch(model, buffers=True)
    buffers = set(full) - set(state_dict)
    assert len(buffers) == 4 and all("relative_position_index" in b for b in buffers)
    assert full[buffers.pop()].shape == (12, 12)
    convert.load_torch(model, {f"module.{k}": v for k, v in full.items()})
    np.testing.assert_array_equal(
        convert.to_torch(model)["out.conv.conv.bias"], state_dict["out.conv.conv.bias"]
    )


def test_missing_and_unexpected_names_are_listed_and_nothing_changes(model, state_dict):
    before = convert.to_torch(model)
    value = state_dict.pop("out.conv.conv.bias")
    state_dict["out.conv.conv.bia"] = value
    with pytest.raises(UserError) as error:
        convert.load_torch(model, state_dict)
    assert "1 names are missing and 1 are unexpected. Check" in str(error.value)
    assert str(error.value).endswith(
        "Missing: out.conv.conv.bias; unexpected: out.conv.conv.bia."
    )
    after = convert.to_torch(model)
    assert all(np.array_equal(before[k], after[k]) for k in before)


def test_of_many_missing_names_the_first_are_listed_in_one_line(model, state_dict):
    with pytest.raises(UserError) as error:
        convert.load_torch(model, {})
    names = sorted(state_dict)
    words = f"Missing: {', '.join(names[:8])}, and {len(names) - 8} more;"
    assert words in str(error.value) and "\n" not in str(error.value)


def test_another_shape_is_named(model, state_dict):
    state_dict["out.conv.conv.weight"] = np.zeros((5, 3, 1, 1, 1), "f4")
    with pytest.raises(UserError) as error:
        convert.load_torch(model, state_dict)
    expected = ": out.conv.conv.weight: (5, 3, 1, 1, 1), expected (2, 3, 1, 1, 1)."
    assert str(error.value).endswith(expected)


@pytest.mark.parametrize("value", [np.nan, -np.inf])
def test_arrays_that_are_not_finite_are_named_and_nothing_changes(
    model, state_dict, value
):
    before = convert.to_torch(model)
    state_dict["out.conv.conv.bias"][1] = value
    with pytest.raises(UserError, match="1 arrays .*NaN.*: out.conv.conv.bias.$"):
        convert.load_torch(model, state_dict)
    after = convert.to_torch(model)
    assert all(np.array_equal(before[k], after[k]) for k in before)


def test_two_names_of_one_tensor_must_agree(rng):
    config = PlainConvUNetConfig(
        in_channels=1, out_channels=2, features_per_stage=(2, 3), strides=(1, 2)
    )
    graphdef, shapes = nnx.split(
        nnx.eval_shape(lambda: models.create(config, rngs=nnx.Rngs(0)))
    )
    draw = jax.tree.map(lambda a: rng.standard_normal(a.shape).astype("f4"), shapes)
    model = nnx.merge(graphdef, draw)
    state_dict = convert.to_torch(model)
    name = "decoder.encoder.stages.1.0.convs.0.all_modules.0.weight"
    first = "encoder.stages.1.0.convs.0.conv.weight"
    np.testing.assert_array_equal(state_dict[name], state_dict[first])
    first_names = {k: v for k, v in state_dict.items() if "all_modules" not in k}
    convert.load_torch(model, first_names)
    state_dict[name] = state_dict[name] + 1
    with pytest.raises(UserError, match=f"two names of one tensor;.*{name}"):
        convert.load_torch(model, state_dict)


def test_nnformer_counts_its_positions_as_published():
    config = NNFormerConfig(
        in_channels=1, out_channels=2, crop_size=(32, 64, 64), embedding_dim=2,
        depths=(1, 1, 1, 1), num_heads=(1, 1, 1, 1), window_size=(4, 4, 8, 4),
    )  # fmt: skip
    graphdef, shapes = nnx.split(
        nnx.eval_shape(lambda: models.create(config, rngs=nnx.Rngs(0)))
    )
    zeros = jax.tree.map(lambda a: np.zeros(a.shape, "f4"), shapes)
    full = convert.to_torch(nnx.merge(graphdef, zeros), buffers=True)
    index = full["decoder.layers.1.blocks.0.attn.relative_position_index"]
    assert index.shape == (64, 64) and index[0, 0] == 3 * 11 + 3 * 7 + 3
    assert index[63, 0] == 6 * 11 + 6 * 7 + 6 and index[0, 63] == 0
    shrunk = full["model_down.layers.3.blocks.0.attn.relative_position_index"]
    assert shrunk.shape == (8, 8)
