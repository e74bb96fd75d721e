import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import PartitionSpec

from swinsmt_jax import SwinUNETRConfig, models, sharding
from swinsmt_jax.config import MeshConfig
from swinsmt_jax.models import split
from swinsmt_jax.training.optimizer import make_optimizer, make_schedule
from swinsmt_jax.training.state import abstract_state, initialize, shardings_of


@pytest.fixture
def made(tiny, make_config):
    config = make_config()
    schedule = make_schedule(config.optimizer, num_steps=6)
    optimizer = make_optimizer(config.optimizer, schedule, network=config.model)
    mesh = sharding.make_mesh(MeshConfig(2, 2))
    return config.model, optimizer, *abstract_state(config.model, optimizer, mesh=mesh)


def test_a_state_is_born_where_its_shapes_say(made):
    config, optimizer, _, abstract = made
    state = initialize(config, optimizer, seed=0, abstract=abstract)
    assert jax.tree.structure(state) == jax.tree.structure(abstract)
    for leaf, wanted in zip(
        jax.tree.leaves(state), jax.tree.leaves(abstract), strict=True
    ):
        assert (leaf.shape, leaf.dtype) == (wanted.shape, wanted.dtype)
        assert leaf.sharding == wanted.sharding
    assert int(state.step) == 0


def test_experts_and_their_moments_are_divided_and_the_rest_is_not(made):
    places = shardings_of(made[3])
    moments = places.opt_state[1][0]
    for tree in (places.params, moments.mu, moments.nu):
        experts = tree["mlp"]["experts"]
        assert {p.spec for p in experts.values()} == {PartitionSpec("expert")}
        assert tree["stem"]["kernel"].is_fully_replicated
    assert places.step.is_fully_replicated


def test_parameters_depend_on_the_seed_alone(made):
    config, optimizer, _, abstract = made
    first, again, other = (
        initialize(config, optimizer, seed=seed, abstract=abstract).params["stem"][
            "kernel"
        ]
        for seed in (0, 0, 1)
    )
    np.testing.assert_array_equal(first, again)
    assert not np.array_equal(first, other)


def test_merge_inverts_split(made):
    config, _, graphdef, _ = made
    model = models.create(config, rngs=nnx.Rngs(0))
    x = jnp.linspace(0, 1, 8).reshape(1, 2, 2, 2, 1)
    structure, params = split(model)
    assert structure == graphdef and type(params) is dict
    np.testing.assert_array_equal(nnx.merge(structure, params)(x), model(x))


def test_another_network_in_the_place_of_a_configs_is_made_everywhere(
    made, monkeypatch
):
    config, optimizer = SwinUNETRConfig(1, 5, 12), made[1]

    def small(config, *, rngs):
        return nnx.Linear(2, 3, rngs=rngs)

    monkeypatch.setattr(models, "create", small)
    mesh = sharding.make_mesh(MeshConfig(1, 1))
    _, abstract = abstract_state(config, optimizer, mesh=mesh)
    state = initialize(config, optimizer, seed=0, abstract=abstract)
    assert set(state.params) == {"kernel", "bias"}
