"""Flags of XLA that a run needs. They must be set before jax starts its devices."""

import os

from swinsmt_jax import checks

VARIABLE = "XLA_FLAGS"
DETERMINISTIC = "--xla_gpu_deterministic_ops"


def set_deterministic() -> None:
    """Ask XLA for deterministic kernels on GPUs, unless the variable says otherwise."""
    given = os.environ.get(VARIABLE, "")
    if DETERMINISTIC not in given:
        os.environ[VARIABLE] = f"{given} {DETERMINISTIC}=true".strip()


def require_deterministic(platform: str) -> None:
    """Raise `UserError` for a GPU whose kernels were not asked to be deterministic."""
    given = os.environ.get(VARIABLE, "").split()
    checks.require(
        platform != "gpu" or f"{DETERMINISTIC}=true" in given,
        f"training.deterministic is set, but {VARIABLE} is {' '.join(given)!r}; add "
        f"{DETERMINISTIC}=true to it before jax starts, as train.py does.",
    )
