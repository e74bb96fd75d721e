"""Activation checkpointing of one module at a time."""

from collections.abc import Callable

import jax
from flax import nnx


def runner(recompute: bool) -> Callable[..., jax.Array]:
    """Return f(module, *inputs) = module(*inputs).

    With `recompute`, its activations are not kept but computed anew in the backward
    pass.
    """
    return nnx.remat(_apply) if recompute else _apply


def _apply(module, *inputs):
    return module(*inputs)
