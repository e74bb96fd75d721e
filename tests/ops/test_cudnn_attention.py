import jax.numpy as jnp
import numpy as np
import pytest

from swinsmt_jax.ops import by_platform
from swinsmt_jax.ops.gpu import cudnn_attention


def operands(rng, *, channels=16, dtype="bfloat16"):
    q, k, v = (
        jnp.asarray(rng.standard_normal((2, n, channels)), jnp.float32)
        for n in (10, 14, 14)
    )
    return q / 2, k / 2, v.astype(dtype)


def test_elsewhere_it_streams_with_one_log_line(rng, caplog):
    q, k, v = operands(rng)
    found = [by_platform.attend(q, k, v, cudnn=True) for _ in range(2)]
    lines = [r for r in caplog.records if "routing=cudnn streams" in r.getMessage()]
    assert len(lines) == 1 and "the platform is cpu" in lines[0].getMessage()
    expected = by_platform.attend(q, k, v)
    for out in found:
        np.testing.assert_array_equal(out, expected)


def test_its_arithmetic_differs_by_the_rounding_of_bfloat16(rng):
    q, k, v = operands(rng)
    out = cudnn_attention.attend(q, k, v, implementation="xla")
    exact = np.asarray(by_platform.attend(q, k, v), np.float32)
    error = np.linalg.norm(np.asarray(out, np.float32) - exact)
    assert out.dtype == v.dtype and 0 < error < 0.02 * np.linalg.norm(exact)


@pytest.mark.parametrize(
    "options, capability, words",
    [
        ({"dtype": "float32"}, "8.0", "values are float32"),
        ({"channels": 12}, "8.0", "12 channels"),
        ({"channels": 136}, "8.6", "not a multiple of 8 up to 128"),
        ({"channels": 136}, "10.0", "136 channels"),
        ({"channels": 264}, "9.0", "not a multiple of 8 up to 256"),
        ({}, "7.5", "compute capability is 7.5, and it needs 8.0"),
        ({}, "gfx90a", "capability is gfx90a"),
        ({}, None, "capability is None"),
        ({}, "8.0", None),
        ({"channels": 192}, "9.0", None),
        ({}, "12.0", None),
    ],
)
def test_knows_the_limits_of_cudnn(rng, options, capability, words):
    device = cudnn_attention.Device("gpu", capability)
    found = cudnn_attention.refusal(*operands(rng, **options), device=device)
    assert found is None if words is None else words in found


def test_sees_the_device_that_jax_computes_on():
    assert cudnn_attention.this_device() == ("cpu", None)
