import os
import subprocess
import sys

import pytest

from swinsmt_jax.checks import UserError
from swinsmt_jax.runtime import xla_flags


def test_a_gpu_needs_the_flag_that_training_sets(monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "--xla_cpu_enable_fast_math=false")
    with pytest.raises(UserError, match=r"add --xla_gpu_deterministic_ops=true to it"):
        xla_flags.require_deterministic("gpu")
    xla_flags.require_deterministic("cpu")
    for _ in range(2):
        xla_flags.set_deterministic()
        xla_flags.require_deterministic("gpu")
    assert os.environ["XLA_FLAGS"].count("deterministic") == 1
    assert os.environ["XLA_FLAGS"].startswith("--xla_cpu_enable_fast_math=false ")


def test_what_is_set_by_hand_stays(monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "--xla_gpu_deterministic_ops=false")
    xla_flags.set_deterministic()
    assert os.environ["XLA_FLAGS"] == "--xla_gpu_deterministic_ops=false"
    with pytest.raises(UserError, match="XLA_FLAGS is '--xla_gpu_deterministic"):
        xla_flags.require_deterministic("gpu")


def test_this_jaxlib_knows_the_flag():
    """An unknown one ends the process."""
    flag = f"{xla_flags.DETERMINISTIC}=true"
    env = os.environ | {"XLA_FLAGS": flag, "JAX_PLATFORMS": "cpu"}
    subprocess.run(
        [sys.executable, "-c", "import jax; jax.devices()"], env=env, check=True
    )
