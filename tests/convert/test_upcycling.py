"""Experts that are copied from a dense MLP, or from fewer experts."""

import jax
import numpy as np
import pytest
from flax import nnx

from swinsmt_jax import SwinSMTConfig, SwinUNETRConfig, convert, models

SIZE = {"feature_size": 12, "depths": (1, 1, 1, 1), "window_size": 4}


def network(experts, seed, **more):
    """A network with drawn parameters; 0 experts are a Swin UNETR."""
    config = SwinUNETRConfig(1, 3, **SIZE)
    if experts:
        own = {"num_experts": experts, "num_moe_stages": 2, **SIZE, **more}
        config = SwinSMTConfig(1, 3, **own)
    rng = np.random.default_rng(seed)
    graph, state = models.abstract_model(config)
    drawn = jax.tree.map(lambda x: rng.normal(0, 0.1, x.shape).astype(x.dtype), state)
    return nnx.merge(graph, drawn)


def block(stage):
    return f"swinViT.layers{stage}.0.blocks.0.mlp"


@pytest.fixture(scope="module")
def dense():
    return convert.to_torch(network(0, 1))


def test_every_expert_begins_as_the_dense_mlp(dense):
    model = network(4, 2)
    before = convert.to_torch(model)
    report = convert.load_what_fits(model, dense)
    after = convert.to_torch(model)
    for stage in (3, 4):
        for ours, theirs in (("0", "linear1"), ("3", "linear2")):
            for kind in ("weight", "bias"):
                source = dense[f"{block(stage)}.{theirs}.{kind}"]
                for e in range(4):
                    copy = after[f"{block(stage)}.experts.{e}.{ours}.{kind}"]
                    np.testing.assert_array_equal(copy, source)
        slots = f"{block(stage)}.to_slot_embeds.0.weight"
        np.testing.assert_array_equal(after[slots], before[slots])
        assert slots in report.missing
    assert not report.unused
    for name in dense:  # what both have
        if name in after:
            np.testing.assert_array_equal(after[name], dense[name])
    words = "each of the 4 experts is a copy of the dense MLP; their slots are newly"
    assert words in str(report) and "noise" not in str(report)


def test_noise_makes_the_copies_differ_by_so_much(dense):
    model = network(4, 2)
    report = convert.load_what_fits(model, dense, noise=0.1)
    after = convert.to_torch(model)
    source = dense[f"{block(4)}.linear1.weight"]
    copies = [after[f"{block(4)}.experts.{e}.0.weight"] - source for e in range(4)]
    for copy in copies:
        assert copy.std() == pytest.approx(0.1 * source.std(), rel=0.05)
    assert not np.array_equal(copies[0], copies[1])
    assert "with noise of 0.1 of its deviation" in str(report)
    again = network(4, 3)
    convert.load_what_fits(again, dense, noise=0.1)  # the same on every process
    name = f"{block(4)}.experts.2.0.weight"
    np.testing.assert_array_equal(convert.to_torch(again)[name], after[name])


@pytest.mark.parametrize("slots", ["dynamic", "learned"])
def test_more_experts_are_copies_of_the_ones_before(slots):
    more = {"slots": slots, "slots_per_expert": 3 * (slots == "learned")}
    few, model = convert.to_torch(network(2, 1, **more)), network(5, 2, **more)
    before = convert.to_torch(model)
    report = convert.load_what_fits(model, few)
    after = convert.to_torch(model)
    for e in range(5):
        copy = after[f"{block(4)}.experts.{e}.3.weight"]
        np.testing.assert_array_equal(copy, few[f"{block(4)}.experts.{e % 2}.3.weight"])
    names = {"dynamic": "to_slot_embeds.0.weight", "learned": "slot_embeds"}
    name = f"{block(4)}.{names[slots]}"
    old = len(few[name])
    np.testing.assert_array_equal(after[name][:old], few[name])
    np.testing.assert_array_equal(after[name][old:], before[name][old:])
    assert "experts 3 to 5 are copies of the 2 before" in str(report)
    assert report.share == 1 and not report.missing and not report.unused


def test_the_same_number_of_experts_is_taken_as_it_is():
    weights, model = convert.to_torch(network(2, 1)), network(2, 2)
    report = convert.load_what_fits(model, weights, noise=0.5)
    after = convert.to_torch(model)
    assert all(np.array_equal(after[name], weights[name]) for name in after)
    assert report.experts == ""
