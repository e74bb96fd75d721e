"""What every network promises, whatever its architecture."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from swinsmt_jax import convert, models
from swinsmt_jax.checks import UserError
from swinsmt_jax.config import model_from_dict, to_dict
from swinsmt_jax.models import registry
from swinsmt_jax.models.nnunet import PlainConvUNetConfig
from swinsmt_jax.training import losses, remat
from tests import recipes

recipes.load("A network")  # so that what the recipe makes keeps the promises too

SIZES = {"in_channels": 1, "out_channels": 3}
# Parameters that get no gradient, by a part of their path.
UNUSED = {
    "dints": ("stem_down/1/",),  # no path starts from this input
    "nnunet_resenc": ("decoder/seg_layers/0/",),  # for deep supervision alone
    "unetr": ("norm_cross_attn",),
}
RATES = ("dropout", "attention_dropout", "drop_path", "dropout_rate", "drop_path_rate")
# A bias before an instance norm moves nothing, and a norm over two voxels gives signs.
WITHOUT_EFFECT = (r".*/conv/bias", r"(backbone/)?encoder10/.*", r"encoder5/.*")
# Whose products without voxels are float32: the router's, and those that make heads.
FLOAT32 = ("swin_smt", "universal_model")


def tiny(name):
    """Return the tiny config of a network and the shape of an input.

    The input is the smallest with which every parameter can get a gradient.
    """
    entry = registry.entry(name)
    if not entry.tiny:
        pytest.fail(f"add a tiny config here: register({name!r}, ..., tiny={{...}})")
    config = entry.config(**SIZES, **entry.tiny)
    side = config.total_stride * max(1, 4 // config.total_stride)
    return config, config.input_shape or (side, side, 2 * side)


@pytest.fixture(scope="module", params=registry.names())
def network(request):
    """Config, graph, parameters moved off their start, input, patterns of unused."""
    config, grid = tiny(request.param)
    unused = UNUSED.get(request.param, ())
    graphdef, shapes = nnx.split(abstract(config))
    rng = np.random.default_rng(0)

    def draw(path, a):
        values = jnp.asarray(0.3 * rng.standard_normal(a.shape) + 0.1, a.dtype)
        is_variance = "running_var" in jax.tree_util.keystr(path)
        return abs(values) if is_variance else values

    params = jax.tree_util.tree_map_with_path(draw, shapes)
    x = jnp.asarray(rng.standard_normal((1, *grid, 1)), jnp.float32)
    return config, graphdef, params, x, unused


@functools.lru_cache(maxsize=2)
def abstract(config):
    return nnx.eval_shape(lambda: models.create(config, rngs=nnx.Rngs(0)))


def names(state):
    return {"/".join(map(str, p)): leaf for p, leaf in nnx.to_flat_state(state)}


def program(config, x, *, key=None):
    """All equations of a network's program, and the type of its logits."""
    graphdef, shapes = nnx.split(abstract(config))

    def run(params, x):
        rngs = None if key is None else nnx.Rngs(dropout=key)
        return nnx.merge(graphdef, params)(x, rngs=rngs)

    closed = jax.make_jaxpr(run)(shapes, x)
    return list(equations_in(closed.jaxpr)), closed.out_avals[0]


def equations_in(jaxpr):
    for equation in jaxpr.eqns:
        yield equation
        for value in jax.tree.leaves(
            list(equation.params.values()), is_leaf=lambda v: hasattr(v, "eqns")
        ):
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                yield from equations_in(inner)


@pytest.fixture(scope="module")
def run(network):
    """The compiled function from parameters and an input to logits and gradients."""
    _, graphdef, _, x, _ = network
    weights = jnp.asarray(np.random.default_rng(1).standard_normal((*x.shape[:4], 3)))

    @jax.jit
    def run(params, x):
        def loss(params):
            logits = nnx.merge(graphdef, params)(x)
            return jnp.vdot(logits, weights.astype(logits.dtype)), logits

        (_, logits), gradients = jax.value_and_grad(loss, has_aux=True)(params)
        return logits, gradients

    return run


@pytest.mark.slow
def test_logits_and_the_gradient_of_every_used_parameter(network, run):
    _, _, params, x, unused = network
    logits, gradients = run(params, x)
    assert float(jnp.ptp(logits)) > 0
    np.testing.assert_array_equal(logits, run(params, x)[0])
    assert run._cache_size() == 1
    for path, gradient in names(gradients).items():
        size = float(jnp.abs(gradient[...]).max())
        assert np.isfinite(size)
        if any(part in path for part in unused):
            assert size == 0, path
        elif not any(re.fullmatch(pattern, path) for pattern in WITHOUT_EFFECT):
            assert size > 1e-6, path


def test_computes_in_bfloat16_and_returns_float32_logits(network):
    config, _, _, x, _ = network
    equations, logits = program(dataclasses.replace(config, dtype=jnp.bfloat16), x)
    assert logits.shape == (*x.shape[:4], config.out_channels)
    assert logits.dtype == jnp.float32
    names = [equation.primitive.name for equation in equations]
    assert "remat2" not in names and "checkpoint" not in names
    products = [
        equation
        for equation, name in zip(equations, names, strict=True)
        if name in ("conv_general_dilated", "dot_general")
    ]
    assert products
    exempt = registry.entry_of(config).name in FLOAT32
    for equation in products:
        if not (exempt and equation.primitive.name == "dot_general"):
            types = {v.aval.dtype for v in equation.invars}
            assert types == {jnp.dtype(jnp.bfloat16)}


def test_the_last_layer_is_the_head_of_the_features(network):
    config, _, _, x, _ = network
    equations, logits = program(config, x)
    graphdef, shapes = nnx.split(abstract(config))
    if not hasattr(abstract(config), "head"):  # it makes the logits by another layer
        assert not hasattr(abstract(config), "features")
        return

    def run(params, x):
        model = nnx.merge(graphdef, params)
        features = model.features(x)
        assert features.shape[:-1] == x.shape[:-1]
        assert model.head.kernel.shape == (1, 1, 1, features.shape[-1], 3)
        assert model.head.bias is not None
        return model.head(features).astype(jnp.float32)

    closed = jax.make_jaxpr(run)(shapes, x)
    assert closed.out_avals[0] == logits
    assert len(list(equations_in(closed.jaxpr))) == len(equations)


def test_parts_are_rematerialised_by_name_and_random_with_rngs_alone(network):
    config, _, _, x, _ = network
    rates = {f.name for f in dataclasses.fields(config)} & set(RATES)
    config = dataclasses.replace(config, **dict.fromkeys(rates, 0.5))
    first, *_, last = config.remat_parts
    for part, key in ((first, None), (last, jax.random.key(0))):
        config = dataclasses.replace(config, remat=(part,))
        equations, _ = program(config, x, key=key)
        names = {equation.primitive.name for equation in equations}
        assert names & {"remat2", "checkpoint"}, names
        draws = any(name.startswith("random_bits") for name in names)
        assert draws == (key is not None and bool(rates))


def test_recomputing_parts_keeps_less_for_the_backward_pass(network):
    config, _, _, x, _ = network
    batch = {"image": x, "label": jax.ShapeDtypeStruct(x.shape[:-1], jnp.uint8)}
    config = dataclasses.replace(config, remat="auto")
    none, *_, all_parts = remat.candidates(config)
    none, most = (
        remat.kept_bytes(candidate, batch, loss=losses.make("dice_ce"))
        for candidate in (none, all_parts)
    )
    assert 0 < most < none


@pytest.mark.slow
def test_a_batch_is_divided_over_the_data_axis(network, run):
    """Each sample has the logits that it has alone."""
    _, graphdef, params, x, _ = network
    batch = jnp.concatenate([x, 0.5 - x])
    expected = jnp.concatenate([run(params, sample[None])[0] for sample in batch])
    axis = (jax.sharding.AxisType.Auto,)
    mesh = jax.make_mesh((2,), ("data",), axis_types=axis, devices=jax.devices()[:2])
    divided = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
    whole = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())

    logits = jax.jit(lambda params, x: nnx.merge(graphdef, params)(x))(
        jax.device_put(params, whole), jax.device_put(batch, divided)
    )
    assert logits.sharding.is_equivalent_to(divided, logits.ndim)
    scale = float(jnp.abs(expected).max())
    np.testing.assert_allclose(logits, expected, rtol=0, atol=1e-4 * scale)


def test_pytorch_names_go_both_ways(network):
    _, graphdef, params, _, _ = network
    model, copy = (
        nnx.merge(graphdef, jax.tree.map(f, params)) for f in (np.array, np.zeros_like)
    )
    state_dict = convert.to_torch(model)
    convert.load_torch(copy, state_dict)
    for ours, theirs in zip(
        jax.tree.leaves(nnx.state(copy)), jax.tree.leaves(params), strict=True
    ):
        np.testing.assert_array_equal(ours, theirs)


def test_configs_survive_a_dictionary(network):
    config = network[0]
    values = to_dict(config)
    assert model_from_dict(values) == config
    assert registry.config_class(values["name"]) is type(config)


def test_refuses_what_it_cannot_take(network):
    config, graphdef, params, x, _ = network
    model = nnx.merge(graphdef, params)
    assert model.config == config and model.total_stride == config.total_stride
    with pytest.raises(UserError, match=r"image patch has shape \(\d+, 1, 7\), but "):
        model(jnp.zeros((1, x.shape[1], 1, 7, 1)))
    with pytest.raises(UserError, match="channels last"):
        model(jnp.zeros((1, 1, *x.shape[1:4])))
    with pytest.raises(UserError, match="at least one sample"):
        model(jnp.zeros((0, *x.shape[1:])))
    with pytest.raises(UserError, match="model.dtype is 'float16'"):
        dataclasses.replace(config, dtype="float16")
    with pytest.raises(UserError, match="entry of model.remat is 'head'"):
        dataclasses.replace(config, remat=("head",))


def test_pyramids_are_checked():
    with pytest.raises(UserError, match="model.strides .* must begin with 1"):
        PlainConvUNetConfig(features_per_stage=(4, 8), strides=(2, 2), **SIZES)
    with pytest.raises(UserError, match="model.strides .* must have 2 entries"):
        PlainConvUNetConfig(features_per_stage=(4, 8), strides=(1, 2, 2), **SIZES)
    with pytest.raises(UserError, match="must be one of 1, 2"):
        PlainConvUNetConfig(features_per_stage=(4, 8), strides=(1, 3), **SIZES)
    with pytest.raises(UserError, match="at least 2 entries"):
        PlainConvUNetConfig(features_per_stage=(4,), strides=(1,), **SIZES)


def test_unetr_takes_one_shape_alone():
    config, _ = tiny("unetr")
    message = (
        r"shape \(32, 32, 16\), but this network accepts only \(16, 16, 32\): its "
    )
    message += "parameters depend on the input shape in its config"
    graphdef, shapes = nnx.split(abstract(config))
    with pytest.raises(UserError, match="image patch has " + message):
        jax.eval_shape(
            lambda p: nnx.merge(graphdef, p)(jnp.zeros((1, 32, 32, 16, 1))), shapes
        )
    with pytest.raises(UserError, match="model.img_size .* multiple of 16"):
        dataclasses.replace(config, img_size=(16, 32, 20))
    with pytest.raises(UserError, match="multiple of model.num_heads, 3"):
        dataclasses.replace(config, num_heads=3)


def test_nnformer_takes_one_shape_alone():
    config, _ = tiny("nnformer")
    graphdef, shapes = nnx.split(abstract(config))
    message = r"this network accepts only \(32, 64, 64\): its parameters depend on"
    with pytest.raises(UserError, match=message):
        jax.eval_shape(
            lambda p: nnx.merge(graphdef, p)(jnp.zeros((1, 64, 64, 64, 1))), shapes
        )
    with pytest.raises(UserError, match=r"next valid shape is \(48, 64, 64\)"):
        dataclasses.replace(config, crop_size=(40, 64, 64))
    with pytest.raises(UserError, match=r"model.patch_size .* must be one of \(2, 4"):
        dataclasses.replace(config, patch_size=(4, 4, 4))
    with pytest.raises(UserError, match="8 channels, which 3 heads do not divide"):
        dataclasses.replace(config, num_heads=(3, 1, 1, 1))


def test_a_network_without_a_tiny_config_is_told_to_add_one(monkeypatch):
    untested = registry.entry("unetr")._replace(name="untested", tiny={})
    monkeypatch.setitem(registry._entries, "untested", untested)
    with pytest.raises(pytest.fail.Exception, match="add a tiny config here: register"):
        tiny("untested")


def test_a_name_belongs_to_one_network():
    unetr, ux_net = registry.entry("unetr"), registry.entry("ux_net")
    with pytest.raises(ValueError, match="'unetr' is taken by UNETRConfig"):
        registry.register("unetr", ux_net.config, ux_net.network)
    assert registry.entry("unetr") == unetr
    with pytest.raises(ValueError, match="must be a NetworkConfig and have a total_st"):
        registry.register("no_stride", registry.NetworkConfig, unetr.network)
