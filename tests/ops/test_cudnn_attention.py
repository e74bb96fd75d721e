import jax
import jax.numpy as jnp
import numpy as np
import pytest

from swinsmt_jax.ops import blockwise_attention, cudnn_attention


def operands(rng, *, channels=16, dtype="bfloat16"):
    q, k, v = (
        jnp.asarray(rng.standard_normal((2, n, channels)), jnp.float32)
        for n in (10, 14, 14)
    )
    return q / 2, k / 2, v.astype(dtype)


def test_elsewhere_it_streams_with_one_log_line(rng, caplog):
    q, k, v = operands(rng)
    found = [cudnn_attention.attend(q, k, v) for _ in range(2)]
    lines = [r for r in caplog.records if "routing=cudnn streams" in r.getMessage()]
    assert len(lines) == 1 and "the platform is cpu" in lines[0].getMessage()
    expected = blockwise_attention.attend(q, k, v)
    for out in found:
        np.testing.assert_array_equal(out, expected)


def test_its_arithmetic_differs_by_the_rounding_of_bfloat16(rng):
    q, k, v = operands(rng)
    out = cudnn_attention.attend(q, k, v, implementation="xla")
    exact = np.asarray(blockwise_attention.attend(q, k, v), np.float32)
    error = np.linalg.norm(np.asarray(out, np.float32) - exact)
    assert out.dtype == v.dtype and 0 < error < 0.02 * np.linalg.norm(exact)


@pytest.mark.parametrize(
    "options, mask, words",
    [
        ({"dtype": "float32"}, None, "values are float32"),
        ({"channels": 12}, None, "12 channels"),
        ({"channels": 136}, None, "136 channels"),
        ({}, np.ones((2, 14), bool), "mask"),
        ({}, None, None),
    ],
)
def test_knows_the_limits_of_cudnn(rng, monkeypatch, options, mask, words):
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    found = cudnn_attention.refusal(*operands(rng, **options), key_mask=mask)
    assert found is None if words is None else words in found
