import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec

from swinsmt_jax import SwinSMTConfig, SwinUNETRConfig, sharding
from swinsmt_jax.checks import UserError
from swinsmt_jax.config import MeshConfig

SMT = SwinSMTConfig(1, 5, 12, num_experts=6, num_moe_stages=1)


@pytest.mark.parametrize(
    "data, expert, shape", [(-1, 1, (8, 1)), (-1, 4, (2, 4)), (2, 2, (2, 2))]
)
def test_a_mesh_takes_the_devices_it_asks_for(data, expert, shape):
    mesh = sharding.make_mesh(MeshConfig(data, expert))
    assert mesh.devices.shape == shape and mesh.axis_names == ("data", "expert")
    assert set(mesh.axis_types) == {AxisType.Auto}


@pytest.mark.parametrize(
    "data, expert, words",
    [
        (4, 4, "4 x 4 = 16 devices, but there are 8"),
        (-1, 3, "mesh.expert is 3, but must divide .*8: take one of 1, 2, 4, 8"),
        (-1, 16, "mesh.expert is 16"),
    ],
)
def test_refuses_impossible_meshes(data, expert, words):
    with pytest.raises(UserError, match=words):
        sharding.make_mesh(MeshConfig(data, expert))


def test_several_processes_take_all_devices(monkeypatch):
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    with pytest.raises(UserError, match="4 of 8 devices.*must use all"):
        sharding.make_mesh(MeshConfig(4, 1))


def test_refuses_what_the_mesh_does_not_divide():
    mesh = sharding.make_mesh(MeshConfig(2, 4))
    sharding.require_divisible(mesh, batch_size=16)
    words = r"batch_size is 10, .* 8 devices .*data 2 x expert 4.*valid size is 16"
    with pytest.raises(UserError, match=words):
        sharding.require_divisible(mesh, batch_size=10)
    words = r"accumulate is 3, .*2 samples that each of the 8 dev.*: take one of 1, 2\."
    with pytest.raises(UserError, match=words):
        sharding.require_divisible(mesh, batch_size=16, accumulate=3)


def test_batches_are_divided_over_all_devices(rng):
    mesh = sharding.make_mesh(MeshConfig(-1, 4))
    batch = {"image": rng.random((16, 3), np.float32), "case": np.arange(16)}
    placed = sharding.place_batch(batch, mesh)
    for name, array in placed.items():
        np.testing.assert_array_equal(array, batch[name])
        assert array.sharding == sharding.batch_sharding(mesh)
        assert {s.data.shape[0] for s in array.addressable_shards} == {2}


@pytest.fixture
def params():
    experts = {"w1": jnp.ones((6, 3, 4)), "b1": jnp.ones((6, 4))}
    return {"blocks": {0: {"mlp": {"experts": experts}}}, "out": {"w1": jnp.ones(6)}}


def test_rules_decide_by_name_and_moments_follow(params):
    mesh = sharding.make_mesh(MeshConfig(2, 2))
    rules = sharding.parameter_rules(SMT)
    state = {"moment": (params, jnp.zeros(()))}  # as deep as an optimiser's
    for tree in (params, jax.tree.leaves(state, is_leaf=lambda x: x is params)[0]):
        places = sharding.tree_shardings(tree, mesh=mesh, rules=rules)
        experts = places["blocks"][0]["mlp"]["experts"]
        assert {p.spec for p in experts.values()} == {PartitionSpec("expert")}
        assert places["out"]["w1"].is_fully_replicated


def test_the_first_rule_that_matches_counts(params):
    mesh = sharding.make_mesh(MeshConfig(2, 2))
    rules = (("experts/b1", PartitionSpec()), *sharding.EXPERT_RULES)
    places = sharding.tree_shardings(params, mesh=mesh, rules=rules)
    experts = places["blocks"][0]["mlp"]["experts"]
    assert experts["b1"].is_fully_replicated
    assert not experts["w1"].is_fully_replicated


def test_a_rule_without_match_is_an_error(params):
    mesh = sharding.make_mesh(MeshConfig(2, 2))
    rules = (*sharding.EXPERT_RULES, ("expats/", PartitionSpec("expert")))
    with pytest.raises(UserError, match="'expats/' matches no parameter"):
        sharding.tree_shardings(params, mesh=mesh, rules=rules)


def test_a_side_that_the_axis_does_not_divide_is_an_error(params):
    mesh = sharding.make_mesh(MeshConfig(2, 4))
    words = r"blocks/0/mlp/experts/b1 has shape \(6, 4\).*side 6 .*multiple of 4"
    with pytest.raises(UserError, match=words):
        sharding.tree_shardings(params, mesh=mesh, rules=sharding.EXPERT_RULES)


def test_a_network_without_experts_has_no_rule():
    assert sharding.parameter_rules(SwinUNETRConfig(1, 5, 12)) == ()
