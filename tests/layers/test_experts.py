import re
from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from swinsmt_jax import sharding
from swinsmt_jax.checks import UserError
from swinsmt_jax.config import MeshConfig
from swinsmt_jax.layers.experts import Experts
from swinsmt_jax.layers.soft_moe import SoftMoE, SoftMoEConfig
from swinsmt_jax.ops import by_platform

COLLECTIVE = r" (all-to-all|all-gather|all-reduce|collective-permute)(?:-start)?\("


def test_recomputing_changes_only_the_memory(rng, monkeypatch):
    monkeypatch.setattr(by_platform, "ENTRIES_ON_CPU", 2**10)
    graphdef, params = nnx.split(Experts(6, num_experts=6, hidden=24, rngs=nnx.Rngs(0)))
    slots = jnp.asarray(rng.standard_normal((2, 6, 5, 6)), jnp.float32)

    def run(recompute):
        def loss(params):
            y = nnx.merge(graphdef, params)(slots, recompute=recompute)
            return jnp.sin(y).sum(), y

        return jax.jit(jax.grad(loss, has_aux=True))(params)

    for a, b in zip(*map(jax.tree.leaves, (run(True), run(False))), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("routing", ["dense", "streaming"])
def test_every_mesh_gives_the_gradients_of_one_device(rng, routing):
    graphdef, params = nnx.split(
        SoftMoE(6, SoftMoEConfig(num_experts=8, routing=routing), rngs=nnx.Rngs(0))
    )
    params = nnx.to_pure_dict(params)
    x = jnp.asarray(rng.standard_normal((8, 16, 6)), jnp.float32)
    results = []
    for data, expert in ((1, 1), (8, 1), (4, 2), (1, 8)):
        mesh = sharding.make_mesh(MeshConfig(data, expert))
        places = sharding.tree_shardings(
            {"": params}, mesh=mesh, rules=sharding.EXPERT_RULES
        )[""]
        batch = sharding.batch_sharding(mesh)

        def value_and_gradients(params, x, mesh=mesh):
            def loss(params):
                return jnp.square(nnx.merge(graphdef, params)(x)).mean()

            with sharding.within(mesh):
                return jax.value_and_grad(loss)(params)

        run = jax.jit(
            value_and_gradients,
            in_shardings=(places, batch),
            out_shardings=(sharding.replicated(mesh), places),
        )
        arguments = jax.device_put(params, places), jax.device_put(x, batch)
        compiled = run.lower(*arguments).compile()
        results.append(jax.tree.map(np.asarray, compiled(*arguments)))
        found = Counter(re.findall(COLLECTIVE, compiled.as_text()))
        assert found["all-gather"] == 0
        assert found["all-to-all"] == (4 if expert > 1 else 0)
    for result in results[1:]:
        for a, b in zip(*map(jax.tree.leaves, (result, results[0])), strict=True):
            np.testing.assert_allclose(a, b, rtol=0, atol=1e-5 * np.abs(b).max())


@pytest.mark.parametrize(
    "batch, experts, words",
    [(6, 4, "batch of 6 .* 8 devices"), (8, 6, "6 experts .* mesh.expert = 4")],
)
def test_refuses_what_the_mesh_does_not_divide(batch, experts, words):
    module = Experts(6, num_experts=experts, hidden=24, rngs=nnx.Rngs(0))
    mesh = sharding.make_mesh(MeshConfig(2, 4))
    with sharding.within(mesh), pytest.raises(UserError, match=words):
        jax.eval_shape(module, jax.ShapeDtypeStruct((batch, experts, 2, 6), "float32"))
