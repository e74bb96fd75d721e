"""What fused attention's rounding does to a whole network, by its plain form."""

import dataclasses

import jax
import numpy as np
import pytest
from flax import nnx

from swinsmt_jax import SwinSMTConfig, create
from swinsmt_jax.ops import by_platform

pytestmark = pytest.mark.slow
# Heads and routing of 8 channels, which cuDNN takes; windows shrink, shift and are odd.
CONFIG = SwinSMTConfig(
    in_channels=1,
    out_channels=5,
    feature_size=24,
    window_size=(3, 3, 3),
    num_experts=2,
    num_moe_stages=1,
    routing="cudnn",
    dtype="bfloat16",
)
SHAPE = (1, 32, 32, 32, 1)


def test_a_bfloat16_network_stays_near_float32_with_fused_attention():
    x = np.random.default_rng(0).standard_normal(SHAPE).astype(np.float32)
    graphdef, params = nnx.split(create(CONFIG, rngs=nnx.Rngs(0)))
    exact = nnx.split(
        create(dataclasses.replace(CONFIG, dtype="float32"), rngs=nnx.Rngs(0))
    )[0]

    def logits(graphdef):
        return np.asarray(jax.jit(lambda p, x: nnx.merge(graphdef, p)(x))(params, x))

    expected, in_blocks = logits(exact), logits(graphdef)
    with by_platform.fused_attention("xla"), by_platform.noting() as notes:
        fused = logits(graphdef)
    assert by_platform.described(notes) == "windows xla; routing xla"
    for found in (in_blocks, fused):
        error = np.linalg.norm(found - expected) / np.linalg.norm(expected)
        assert 0 < error < 0.02
    assert not np.array_equal(in_blocks, fused)
