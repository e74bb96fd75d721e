"""What devices send in a training step, counted and turned into an efficiency."""

import jax
import numpy as np
import pytest

from benchmarks import scaling
from swinsmt_jax import SwinSMTConfig

SMALL = SwinSMTConfig(
    1, 5, 12, num_experts=8, num_moe_stages=1, depths=(1, 1, 1, 1), window_size=2
)
COUNTED = """
  %a = f32[2,3]{1,0} all-reduce(%x), replica_groups={{0,1},{2,3}}, to_apply=%sum
  %b = (f32[5]{0}, s32[]) all-reduce(%y, %z), replica_groups={{0},{1}}, to_apply=%sum
  %c = f32[7]{0} all-reduce(%y), replica_groups=[4,1]<=[4], to_apply=%sum
  %d = bf16[4]{0} all-to-all(%y), replica_groups=[1,4]<=[4], dimensions={0}
"""


def test_groups_of_one_device_send_nothing():
    assert scaling.collectives(COUNTED) == {
        "all-reduce": {"count": 1, "bytes": 24},
        "all-to-all": {"count": 1, "bytes": 8},
    }


def row(data, expert, *, rest=600, experts=800):
    held = experts // expert
    sent = rest + (held if data > 1 else 0)
    return {
        "data": data,
        "expert": expert,
        "expert_gradients": held,
        "collectives": {"all-reduce": {"count": 1, "bytes": sent}},
    }


def milliseconds(found):
    """Of gradients, where computing takes no time that counts."""
    cost = {"operations": 1.0, "utilisation": 1.0, "voxels": 1.0}
    return scaling.expected(found[0], found[1], **cost)["gradients_ms"]


def test_nodes_exchange_an_eighth_of_all_gradients_for_every_mesh():
    between = scaling.Cluster("NVIDIA A100", 8, float("inf"), 1.0)
    for data, expert in scaling.meshes(8):
        found = milliseconds((between, row(data, expert)))
        assert found == pytest.approx(1e3 * 2 * 7 / 8 * 1400 / 8)


def test_a_node_adds_up_experts_over_the_data_axis_alone():
    within = scaling.Cluster("NVIDIA A100", 1, 1.0, float("inf"))
    rest = 2 * 7 / 8 * 600
    assert milliseconds((within, row(8, 1))) == pytest.approx(1e3 * 2 * 7 / 8 * 1400)
    assert milliseconds((within, row(2, 4))) == pytest.approx(1e3 * (rest + 200))
    assert milliseconds((within, row(1, 8))) == pytest.approx(1e3 * rest)


@pytest.mark.slow
def test_a_step_adds_up_the_gradients_and_next_to_nothing_else():
    # At 64, the coarsest grid has 2 voxels a side: each tap of its kernels sees one.
    found = {n: scaling.measure(SMALL, *n, side=64) for n in ((2, 1), (4, 1), (1, 4))}
    sent = {n: r["collectives"]["all-reduce"]["bytes"] for n, r in found.items()}
    _, like, _ = scaling.compile_step(SMALL, 1, 1, side=64)
    sizes = [np.prod(leaf.shape) for leaf in jax.tree.leaves(like.params)]
    gradients = 4 * int(sum(sizes))
    assert gradients <= sent[2, 1] < 1.01 * gradients
    assert sent[4, 1] == sent[2, 1]  # however many devices
    experts = 4 * found[1, 4]["expert_gradients"]
    assert gradients - experts <= sent[1, 4] < 1.01 * gradients - experts
