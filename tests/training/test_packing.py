import jax
import numpy as np
import pytest

from swinsmt_jax import sharding
from swinsmt_jax.config import MeshConfig
from swinsmt_jax.training import packing
from swinsmt_jax.training.packing import Packing


@pytest.fixture
def parameters():
    """Shapes with shardings: one parameter is large, one divided over two devices."""
    mesh = sharding.make_mesh(MeshConfig(data=1, expert=2), devices=jax.devices()[:2])
    whole = sharding.replicated(mesh)
    divided = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("expert"))

    def leaf(*shape, place=whole):
        return jax.ShapeDtypeStruct(shape, np.float32, sharding=place)

    return {
        "a.b": {"bias": leaf(3), "kernel": leaf(2, 4)},
        "a": {"bias": leaf(1, 5), "kernel": leaf(packing.SMALL + 1)},
        "experts": {"bias": leaf(2, 3, place=divided), "scale": leaf()},
    }


def test_small_parameters_of_a_kind_are_joined_and_parted_again(parameters, rng):
    joined = Packing(parameters, kind=lambda name: name.endswith("kernel"))
    values = jax.tree.map(lambda leaf: rng.random(leaf.shape, np.float32), parameters)
    tree = {"count": np.int32(7), "moments": (values, values), "none": {}}
    packed = joined.pack(tree)
    expected = {
        "a/bias": (9,),  # with a.b/bias and experts/scale
        "a/kernel": (packing.SMALL + 1,),
        "a.b/kernel": (2, 4),
        "experts/bias": (2, 3),
    }
    for moments in packed["moments"]:
        assert {name: array.shape for name, array in moments.items()} == expected
    assert packed["count"] == 7 and packed["none"] == {}
    jax.tree.map(np.testing.assert_array_equal, joined.unpack(packed), tree)
