"""Eight virtual CPU devices, quick compilation, and the optional shared data."""

import os
import tempfile
from importlib.metadata import version
from pathlib import Path

# The tests compile thousands of small programs and run them once: not optimising them
# spares more than it costs, and so do the older emitters of fusions, which jaxlib 0.10
# has. Processes that they start inherit it, and the cache; see `optimised`.
os.environ.setdefault(
    "XLA_FLAGS",
    "--xla_backend_optimization_level=0"
    + " --xla_cpu_use_fusion_emitters=false" * version("jaxlib").startswith("0.10."),
)
os.environ.setdefault(
    "JAX_COMPILATION_CACHE_DIR",
    str(Path(tempfile.gettempdir()) / "swinsmt_jax_test_cache"),
)
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")

import jax
import numpy as np
import pytest
from absl import flags
from hypothesis import settings

jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 8)
settings.register_profile("reproducible", derandomize=True)
settings.load_profile("reproducible")
if not flags.FLAGS.is_parsed():  # grain's workers read absl flags
    flags.FLAGS.mark_as_parsed()

SHARED = Path(__file__).resolve().parents[2] / "shared"


@pytest.fixture(scope="session")
def shared() -> Path:
    """Folder with golden tensors and a real scan, beside the checkout; else skip."""
    if not (SHARED / "parity").is_dir():  # any folder may be called shared
        pytest.skip(f"needs the golden tensors in {SHARED / 'parity'}")
    return SHARED


@pytest.fixture
def optimised(monkeypatch):
    """Processes that are started compile as they do for users."""
    monkeypatch.delenv("XLA_FLAGS")


@pytest.fixture
def rng() -> np.random.Generator:
    """Seeded generator of a test's inputs."""
    return np.random.default_rng(0)
