import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from swinsmt_jax import SwinSMTConfig, SwinUNETRConfig, models
from swinsmt_jax.checks import UserError

SMALL = SwinSMTConfig(
    in_channels=1,
    out_channels=3,
    feature_size=6,
    num_experts=3,
    num_moe_stages=2,
    depths=(2, 1, 1, 1),
    num_heads=(1, 2, 2, 2),
    window_size=4,
)

TINY = dataclasses.replace(SMALL, depths=(1, 1, 1, 1))


def build(config):
    make = jax.jit(lambda: nnx.state(models.create(config, rngs=nnx.Rngs(0))))
    graphdef, _ = nnx.split(
        nnx.eval_shape(lambda: models.create(config, rngs=nnx.Rngs(0)))
    )
    return graphdef, make()


@pytest.fixture(scope="module")
def small():
    graphdef, params = build(SMALL)

    @jax.jit
    def apply(params, x):
        return nnx.merge(graphdef, params)(x)

    return graphdef, params, apply


@pytest.fixture(scope="module")
def patch():
    x = np.random.default_rng(0).standard_normal((1, 32, 64, 32, 1))
    return jnp.asarray(x, jnp.float32)


@pytest.mark.parametrize(
    ("config", "count"),
    [
        (dict(num_experts=32, num_moe_stages=3), 170_783_560),
        (dict(num_experts=16, num_moe_stages=3), 114_937_672),
        (dict(num_experts=8, num_moe_stages=3), 87_014_728),
        (dict(num_experts=4, num_moe_stages=3), 73_053_256),
        (dict(residual_conv=True), 72_767_752),
    ],
)
def test_parameter_counts_of_the_published_networks(config, count):
    kind = SwinSMTConfig if "num_experts" in config else SwinUNETRConfig
    config = kind(in_channels=1, out_channels=118, feature_size=48, **config)
    assert models.count_parameters(config) == count


def test_maps_any_multiple_of_32_to_float32_logits(small, patch):
    _, params, apply = small
    logits = apply(params, patch)
    assert logits.shape == (1, 32, 64, 32, 3) and logits.dtype == jnp.float32
    np.testing.assert_array_equal(logits, apply(params, patch))


def test_hidden_states_halve_the_grid_and_are_standardised(small, patch):
    graphdef, params, _ = small
    hidden = jax.jit(lambda p, x: nnx.merge(graphdef, p).hidden_states(x))(
        params, patch
    )
    for i, state in enumerate(hidden):
        s = 2 ** (i + 1)
        assert state.shape == (1, 32 // s, 64 // s, 32 // s, 6 * 2**i)
        np.testing.assert_allclose(state.mean(-1), 0, atol=1e-4)


def test_routing_weights_come_per_moe_block(small, patch):
    graphdef, params, apply = small
    logits, routing = jax.jit(
        lambda p, x: nnx.merge(graphdef, p)(x, return_routing=True)
    )(params, patch)
    np.testing.assert_allclose(logits, apply(params, patch), atol=1e-5)
    assert sorted(routing) == ["stage3/block0", "stage4/block0"]
    assert routing["stage3/block0"].dispatch.shape == (1, 4 * 8 * 4, 3, 43)
    np.testing.assert_allclose(routing["stage4/block0"].dispatch.sum(1), 1, atol=1e-5)


@pytest.mark.slow
def test_every_parameter_gets_a_gradient(patch):
    config = dataclasses.replace(TINY, patch_merging="octants", residual_conv=True)
    graphdef, params = build(config)
    weights = jnp.asarray(
        np.random.default_rng(1).standard_normal((1, 32, 64, 32, 3)), jnp.float32
    )
    gradients = jax.jit(
        jax.grad(lambda p: jnp.vdot(nnx.merge(graphdef, p)(patch), weights))
    )(params)
    for path, leaf in nnx.to_flat_state(gradients):
        # Behind the last instance norm one voxel is left, which it maps to zero.
        if path[0] == "encoder10":
            continue
        assert float(jnp.abs(leaf[...]).max()) > 0, path


@pytest.mark.parametrize("part", ["stage1", "stage4", "encoder", "decoder"])
def test_each_part_is_rematerialised_by_name(patch, part):
    def jaxpr_of(config):
        graphdef, params = nnx.split(
            nnx.eval_shape(lambda: models.create(config, rngs=nnx.Rngs(0)))
        )
        return str(jax.make_jaxpr(lambda p: nnx.merge(graphdef, p)(patch))(params))

    assert "remat" not in jaxpr_of(TINY)
    assert "remat" in jaxpr_of(dataclasses.replace(TINY, remat=(part,)))


@pytest.mark.slow
def test_rematerialisation_does_not_change_gradients(patch):
    params = build(TINY)[1]

    def gradient(config):
        graphdef, _ = nnx.split(
            nnx.eval_shape(lambda: models.create(config, rngs=nnx.Rngs(0)))
        )

        def loss(params):
            last = nnx.merge(graphdef, params).hidden_states(patch)[3]
            return jnp.square(last - 1).mean()

        return jax.jit(jax.grad(loss))(params)

    remat = gradient(dataclasses.replace(TINY, remat=("stage1", "stage3")))
    for a, b in zip(
        jax.tree.leaves(gradient(TINY)), jax.tree.leaves(remat), strict=True
    ):
        np.testing.assert_allclose(a, b, atol=1e-5)


@pytest.mark.slow
def test_dropout_is_on_with_rngs_alone(patch):
    config = dataclasses.replace(
        TINY, dropout=0.1, attention_dropout=0.1, drop_path=0.3
    )
    graphdef, params = build(config)

    @jax.jit
    def apply(params, x, seed):
        rngs = nnx.Rngs(dropout=jax.random.key(seed))
        model = nnx.merge(graphdef, params)
        return model(x), model(x, rngs=rngs)

    still, first = apply(params, patch, 0)
    same, second = apply(params, patch, 1)
    np.testing.assert_array_equal(still, same)
    assert not np.allclose(first, still) and not np.allclose(first, second)


@pytest.mark.slow
def test_a_window_of_three_sides_is_taken(patch):
    config = dataclasses.replace(TINY, window_size=(2, 4, 3))
    graphdef, params = build(config)
    logits = jax.jit(lambda p, x: nnx.merge(graphdef, p)(x))(params, patch)
    assert bool(jnp.isfinite(logits).all())
    tables = [p for p, _ in nnx.to_flat_state(params) if "relative" in p[-1]]
    assert len(tables) == 4


def test_attention_stays_within_window_and_shift():
    """A voxel outside the window and its shifted neighbours has zero gradient."""
    config = SwinUNETRConfig(
        in_channels=1, out_channels=1, feature_size=3, num_heads=(1, 1, 1, 1),
        depths=(2, 1, 1, 1), window_size=4,
    )  # fmt: skip
    graphdef, params = build(config)

    def response(x):
        stage = nnx.merge(graphdef, params).swinViT.layers1
        for block in stage.blocks:
            x, _ = block(x)
        return x[0, 0, 0, 0].sum()

    x = jnp.asarray(np.random.default_rng(0).standard_normal((1, 16, 16, 16, 3)), "f4")
    seen = jnp.abs(jax.jit(jax.grad(response))(x)).sum((0, -1)) > 0
    # The shifted window of token 0 holds tokens 0-1, from the plain windows 0-3.
    assert bool(seen[:4, :4, :4].all())
    assert int(seen.sum()) == 4**3


def test_refuses_impossible_inputs(small):
    graphdef, params, _ = small
    model = nnx.merge(graphdef, params)
    with pytest.raises(UserError, match=r"next valid shape is \(32, 64, 32\)"):
        model(jnp.zeros((1, 32, 40, 32, 1)))
    with pytest.raises(UserError, match="channels last"):
        model(jnp.zeros((1, 1, 32, 32, 32)))
    with pytest.raises(UserError, match="config is a dict"):
        models.create({}, rngs=nnx.Rngs(0))
