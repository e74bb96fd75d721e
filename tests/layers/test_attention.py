"""The layers of attention with cuDNN's rounding, by its plain form."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from swinsmt_jax.layers.attention import SkipAttention, WindowAttention
from swinsmt_jax.ops import by_platform

WINDOW = (3, 3, 3)
OPTIONS = {"num_heads": 2, "window_size": WINDOW, "dtype": "bfloat16"}


def tokens(rng, count=8):
    return jnp.asarray(rng.normal(size=(count, 2, 27, 16)), jnp.bfloat16)


def both(function, *arrays):
    """Results in blocks and fused, in float32, and how the latter was computed."""
    exact = jax.jit(function)(*arrays)
    with by_platform.fused_attention("xla"), by_platform.noting() as notes:
        fused = jax.jit(lambda *arrays: function(*arrays))(*arrays)
    return *(np.asarray(a, np.float32) for a in (exact, fused)), notes


def test_nnformers_windows_are_fused_too(rng):
    layer = SkipAttention(16, **OPTIONS, rngs=nnx.Rngs(0))
    exact, fused, notes = both(layer, tokens(rng), tokens(rng))
    assert notes == {"windows": {"xla": ["2 x 27 x 2 x 8"]}}
    assert 0 < np.linalg.norm(fused - exact) < 0.02 * np.linalg.norm(exact)


def test_dropout_of_the_weights_takes_the_plain_form(rng):
    layer = WindowAttention(16, **OPTIONS, attention_dropout=0.5, rngs=nnx.Rngs(0))
    with_key = functools.partial(layer, key=jax.random.key(0))
    exact, fused, notes = both(with_key, tokens(rng))
    assert notes == {"windows": {"plain, for dropout": ["2 x 27 x 2 x 8"]}}
    np.testing.assert_array_equal(exact, fused)
    assert "plain" not in str(both(layer, tokens(rng))[2])


def test_fused_windows_are_divided_over_a_mesh(rng):
    layer = WindowAttention(16, **OPTIONS, rngs=nnx.Rngs(0))
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    x = tokens(rng)
    divided = jax.device_put(x, NamedSharding(mesh, PartitionSpec("data")))
    _, alone, _ = both(layer, x)
    _, found, _ = both(layer, divided)
    np.testing.assert_allclose(found, alone, rtol=0.02, atol=0.02)


@pytest.mark.parametrize(
    "bytes_limit, entries", [(80 * 10**9, 39_062_500), (None, 2**23), (10**9, 2**23)]
)
def test_a_gpu_makes_arrays_for_its_memory(monkeypatch, bytes_limit, entries):
    class GPU:
        def memory_stats(self):
            return bytes_limit and {"bytes_limit": bytes_limit}

    assert by_platform.entries_at_a_time() == by_platform.ENTRIES_ON_CPU
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(jax, "local_devices", lambda: [GPU()])
    assert by_platform.entries_at_a_time() == entries
