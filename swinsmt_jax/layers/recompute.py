"""Activation checkpointing of one module at a time."""

from collections.abc import Callable

import jax
from flax import nnx


def maybe_remat(recompute: bool) -> Callable[..., jax.Array]:
    """Return f(module, *inputs) = module(*inputs).

    With `recompute`, its activations are not kept but recomputed in the backward
    pass.
    """
    return nnx.remat(_apply) if recompute else _apply


def compiler_options(platform: str) -> dict[str, str] | None:
    """Return what a program must be compiled with for recomputation to save memory.

    Before jax 0.11 XLA removes on CPU the barriers that keep it from finding that what
    is recomputed is there already.
    """
    if platform != "cpu":
        return None
    return {"xla_disable_hlo_passes": "cse_barrier_expander"}


def _apply(module, *inputs):
    return module(*inputs)
