"""PyTorch's initialisations, so that training starts as the published one."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from swinsmt_jax.ops.tracing import traced_once


def uniform_fan_in(rngs: nnx.Rngs, shape: tuple[int, ...], *, fan_in: int) -> nnx.Param:
    """Draw a parameter from U(-1/sqrt(fan_in), 1/sqrt(fan_in)).

    This is `kaiming_uniform_(a=sqrt(5))` of weights and the default of biases in
    PyTorch's linear and convolution layers.
    """
    bound = np.float32(1 / np.sqrt(fan_in))
    return nnx.Param(bound * _uniform(rngs.params(), shape))


def he_normal(rngs: nnx.Rngs, shape: tuple[int, ...], *, fan_in: int) -> nnx.Param:
    """Draw a parameter from N(0, 2 / fan_in), as nnU-Net does (He et al. 2015)."""
    # The hash gives -1 too, of which the inverse error function is infinite.
    draw = jax.lax.erf_inv((1 - 2.0**-23) * _uniform(rngs.params(), shape))
    return nnx.Param(np.float32(2 / np.sqrt(fan_in)) * draw)


def truncated_normal(
    rngs: nnx.Rngs, shape: tuple[int, ...], *, stddev: float
) -> nnx.Param:
    """Draw a parameter from a normal distribution, cut at two standard deviations."""
    cut = math.erf(2 / math.sqrt(2))
    draw = jax.lax.erf_inv(cut * _uniform(rngs.params(), shape))
    return nnx.Param(np.float32(stddev * np.sqrt(2)) * draw)


def normal(rngs: nnx.Rngs, shape: tuple[int, ...]) -> nnx.Param:
    """Draw a parameter from the standard normal distribution."""
    centred = _uniform(rngs.params(), shape) + np.float32(2.0**-24)  # never -1
    return nnx.Param(np.float32(np.sqrt(2)) * jax.lax.erf_inv(centred))


def constant(value: float, shape: tuple[int, ...]) -> nnx.Param:
    """Fill a float32 parameter with one value."""
    return nnx.Param(jnp.full(shape, value, jnp.float32))


@functools.partial(jax.jit, static_argnames="shape")
def _uniform(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Draw from U[-1, 1) by hashing each element's index with the key.

    A network has some 250 parameters: a hash of each is a few instructions to compile,
    a threefry generator a loop of rounds. Unlike the hardware generators ("rbg") it
    gives the same values on every backend and under every sharding. The mixing
    function has the constants of "triple32" (C. Wellons, "Prospecting for Hash
    Functions", 2018).
    """
    words = jax.random.key_data(key)
    index, stride = jnp.zeros(shape, jnp.uint32), 1
    for axis in reversed(range(len(shape))):
        position = jax.lax.broadcasted_iota(jnp.uint32, shape, axis)
        index, stride = index + position * np.uint32(stride), stride * shape[axis]
    bits = _mix(_mix(index + words[0]) ^ words[1])
    return (bits >> 8).astype(jnp.float32) * np.float32(2.0**-23) - 1


@traced_once
def _mix(x):
    x = (x ^ (x >> 17)) * np.uint32(0xED5AD4BB)
    x = (x ^ (x >> 11)) * np.uint32(0xAC4C1B51)
    x = (x ^ (x >> 15)) * np.uint32(0x31848BAB)
    return x ^ (x >> 14)
