"""Standardisation, the common part of layer and instance norms; and the RMS norm."""

import functools

import jax
import jax.numpy as jnp

from swinsmt_jax.ops.tracing import traced_once


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def standardize(
    x: jax.Array, axes: tuple[int, ...], epsilon: float = 1e-5
) -> jax.Array:
    """Subtract the mean and divide by the standard deviation over `axes`, in float32.

    The variance is the biased one, as in PyTorch's layer and instance norms. Of the
    size of `x`, the backward pass needs `x` alone, in its own dtype.
    """
    return _standardize(x, axes, epsilon)[0]


@functools.partial(traced_once, static_argnums=(1, 2))
def _standardize(x, axes, epsilon):
    mean = jnp.mean(x.astype(jnp.float32), axis=axes, keepdims=True)
    centred = x.astype(jnp.float32) - mean
    variance = jnp.mean(jnp.square(centred), axis=axes, keepdims=True)
    scale = jax.lax.rsqrt(variance + epsilon)
    return centred * scale, (x, mean, scale)


@functools.partial(traced_once, static_argnums=(0, 1))
def _standardize_backward(axes, epsilon, saved, cotangent):
    """With result y and cotangent g: scale (g - mean g - y mean(g y))."""
    x, mean, scale = saved
    y = (x.astype(jnp.float32) - mean) * scale
    mean_g = jnp.mean(cotangent, axis=axes, keepdims=True)
    mean_gy = jnp.mean(cotangent * y, axis=axes, keepdims=True)
    return (((cotangent - mean_g - y * mean_gy) * scale).astype(x.dtype),)


standardize.defvjp(_standardize, _standardize_backward)


def rms_norm(x: jax.Array, gamma: jax.Array) -> jax.Array:
    """Return x / ||x|| * sqrt(C) * gamma over the last axis, in float32.

    A zero vector stays zero and has a zero gradient.
    """
    x = x.astype(jnp.float32)
    squares = jnp.sum(jnp.square(x), axis=-1, keepdims=True)
    scale = jax.lax.rsqrt(jnp.maximum(squares, 1e-24)) * x.shape[-1] ** 0.5
    return x * scale * gamma
