"""PyTorch's default initialisation, so that training starts as the published one."""

import jax
import numpy as np
from flax import nnx


def uniform_fan_in(rngs: nnx.Rngs, shape: tuple[int, ...], *, fan_in: int) -> nnx.Param:
    """Draw a parameter from U(-1/sqrt(fan_in), 1/sqrt(fan_in)).

    This is `kaiming_uniform_(a=sqrt(5))` of weights and the default of biases in
    PyTorch's linear and convolution layers.
    """
    bound = float(1 / np.sqrt(fan_in))
    return nnx.Param(
        jax.random.uniform(rngs.params(), shape, minval=-bound, maxval=bound)
    )


def constant(value: float, shape: tuple[int, ...]) -> nnx.Param:
    """Fill a float32 parameter with one value."""
    return nnx.Param(jax.numpy.full(shape, value, jax.numpy.float32))
