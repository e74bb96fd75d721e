"""Values that travel between processes and stay on disk."""

import numpy as np
import pytest

from swinsmt_jax.runtime import plain


def test_values_come_back():
    value = {"a": [1, None, "x", True, 0.1], "b": {"c": np.float32(0.5), "d": np.nan}}
    found = plain.loads(plain.dumps(value))
    assert found["a"] == value["a"] and found["b"]["c"] == 0.5
    assert np.isnan(found["b"]["d"])
    for dtype in ("bool", "uint8", "int64", "float32"):
        array = np.arange(6).reshape(2, 3).astype(dtype)[:, ::2]
        found = plain.loads(plain.dumps([array]))[0]
        assert found.dtype == dtype
        np.testing.assert_array_equal(found, array)


@pytest.mark.parametrize("value", [{1j}, object(), np.array([object()]), b"x"])
def test_what_is_neither_json_nor_numbers_is_not_sent(value):
    with pytest.raises(TypeError):
        plain.dumps(value)


@pytest.mark.parametrize(
    "text",
    [
        b"cposix\nsystem\n(S'true'\ntR.",  # a pickle
        b"\xff",
        "[" * 100_000,
        '{"array of": "O", "shape": [1], "bytes": "AAAAAAAAAAA="}',
        '{"array of": "<i4", "shape": [1000000000], "bytes": "AAAA"}',
        '{"array of": "<i4", "shape": [-1], "bytes": "AAAA"}',
        '{"array of": "nonsense", "shape": [1], "bytes": "AAAA"}',
        '{"array of": "<i4", "bytes": "AAAA"}',
        '{"array of": "<i4", "shape": null, "bytes": "AAAA"}',
    ],
)
def test_text_of_no_value_is_refused(text):
    with pytest.raises(ValueError):
        plain.loads(text)
