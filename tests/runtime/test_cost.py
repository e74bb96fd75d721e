"""The peak of a device by the name that JAX gives it."""

import pytest

from swinsmt_jax.runtime import cost


@pytest.mark.parametrize(
    ("kind", "tera"),
    [
        ("NVIDIA A100-SXM4-40GB", 312),
        ("NVIDIA A100 80GB PCIe", 312),
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H100 NVL", 835),
        ("NVIDIA H200", 989),
        ("NVIDIA H200 NVL", 835),
        ("NVIDIA GH200 480GB", 989),
        ("NVIDIA B200", 2250),
        ("NVIDIA L40S", 362),
        ("TPU v4", 275),
        ("TPU v5 lite", 197),
        ("TPU v5e", 197),
        ("TPU v5", 459),
        ("TPU v5p", 459),
        ("TPU v6 lite", 918),
        ("TPU v6e", 918),
    ],
)
def test_the_peak_is_that_of_the_card(kind, tera):
    assert cost.peak_of(kind) == tera * 1e12


def test_others_have_no_peak_and_no_utilisation():
    for kind in ("cpu", "NVIDIA L40", "NVIDIA H100 80GB HBM3 MIG 1g.10gb"):
        assert cost.peak_of(kind) is None
