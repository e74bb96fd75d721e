"""PyTorch's initialisations, so that training starts as the published one."""

import contextlib
import functools
import math
from collections.abc import Callable, Iterator
from contextvars import ContextVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

_undrawn: ContextVar[bool] = ContextVar("undrawn", default=False)


@contextlib.contextmanager
def undrawn() -> Iterator[None]:
    """Make parameters as `jax.ShapeDtypeStruct`, without drawing or tracing them."""
    token = _undrawn.set(True)
    try:
        yield
    finally:
        _undrawn.reset(token)


def _shape(shape):
    return jax.ShapeDtypeStruct(tuple(shape), jnp.float32)


def _key(rngs):
    return None if _undrawn.get() else rngs.params()


def uniform(fan_in: int) -> Callable[..., jax.Array]:
    """Return (key, shape, dtype) -> float32 array of U(-bound, bound).

    The bound is 1 / sqrt(fan_in), as in `kaiming_uniform_(a=sqrt(5))` of weights and
    the default of biases in PyTorch's linear and convolution layers.
    """
    bound = np.float32(1 / np.sqrt(fan_in))

    def draw(key, shape, dtype=None):
        return _shape(shape) if _undrawn.get() else bound * _uniform(key, shape)

    return draw


def gaussian(stddev: float, within: float = 1 - 2.0**-23) -> Callable[..., jax.Array]:
    """Return (key, shape, dtype) -> float32 array of N(0, stddev^2).

    It is drawn from the part `within` the distribution: by default, all but infinity.
    """
    scale = np.float32(stddev * np.sqrt(2))

    def draw(key, shape, dtype=None):
        if _undrawn.get():
            return _shape(shape)
        return scale * jax.lax.erf_inv(within * _uniform(key, shape))

    return draw


def filled(value: float) -> Callable[..., jax.Array]:
    """Return (key, shape, dtype) -> float32 array of one value."""

    def fill(key, shape, dtype=None):
        return _shape(shape) if _undrawn.get() else jnp.full(shape, value, jnp.float32)

    return fill


def uniform_fan_in(rngs: nnx.Rngs, shape: tuple[int, ...], *, fan_in: int) -> nnx.Param:
    """Draw a parameter from `uniform(fan_in)`."""
    return nnx.Param(uniform(fan_in)(_key(rngs), shape))


def he_normal(rngs: nnx.Rngs, shape: tuple[int, ...], *, fan_in: int) -> nnx.Param:
    """Draw a parameter from N(0, 2 / fan_in), as nnU-Net does (He et al. 2015)."""
    return _normal(rngs, shape, stddev=np.sqrt(2 / fan_in))


def truncated_normal(
    rngs: nnx.Rngs, shape: tuple[int, ...], *, stddev: float
) -> nnx.Param:
    """Draw a parameter from a normal distribution, cut at two standard deviations."""
    return _normal(rngs, shape, stddev=stddev, within=math.erf(2 / math.sqrt(2)))


def normal(rngs: nnx.Rngs, shape: tuple[int, ...], *, stddev: float = 1) -> nnx.Param:
    """Draw a parameter from a normal distribution."""
    return _normal(rngs, shape, stddev=stddev)


def constant(value: float, shape: tuple[int, ...]) -> nnx.Param:
    """Fill a float32 parameter with one value."""
    return nnx.Param(filled(value)(None, shape))


def made(make: Callable[[], object], shape: tuple[int, ...]) -> jax.Array:
    """Return `make()` as float32; within `undrawn`, its shape without calling it."""
    return _shape(shape) if _undrawn.get() else jnp.asarray(make(), jnp.float32)


def _normal(rngs, shape, **distribution):
    return nnx.Param(gaussian(**distribution)(_key(rngs), shape))


@functools.partial(jax.jit, static_argnames="shape")
def _uniform(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Draw from U[-1, 1) by hashing each element's index with the key.

    In place of `jax.nn.initializers`, whose threefry generator makes the program that
    initialises a network of 169 parameters three times as long and five times as slow
    to compile (benchmarks/NOTES.md, entry 10). Unlike "rbg" it gives the same values on
    every backend and under every sharding. The mixing function has the constants of
    "triple32" (C. Wellons, "Prospecting for Hash Functions", 2018).
    """
    words = jax.random.key_data(key)
    index, stride = jnp.zeros(shape, jnp.uint32), 1
    for axis in reversed(range(len(shape))):
        position = jax.lax.broadcasted_iota(jnp.uint32, shape, axis)
        index, stride = index + position * np.uint32(stride), stride * shape[axis]
    bits = _mix(_mix(index + words[0]) ^ words[1])
    return (bits >> 8).astype(jnp.float32) * np.float32(2.0**-23) - 1


def _mix(x):
    x = (x ^ (x >> 17)) * np.uint32(0xED5AD4BB)
    x = (x ^ (x >> 11)) * np.uint32(0xAC4C1B51)
    x = (x ^ (x >> 15)) * np.uint32(0x31848BAB)
    return x ^ (x >> 14)
