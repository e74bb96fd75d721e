"""Standardisation, the common part of layer and instance norms; and the RMS norm."""

import jax
import jax.numpy as jnp


def standardize(
    x: jax.Array, axes: tuple[int, ...], *, epsilon: float = 1e-5
) -> jax.Array:
    """Subtract the mean and divide by the standard deviation over `axes`, in float32.

    The variance is the biased one, as in PyTorch's layer and instance norms.
    """
    x = x.astype(jnp.float32)
    x = x - jnp.mean(x, axis=axes, keepdims=True)
    variance = jnp.mean(jnp.square(x), axis=axes, keepdims=True)
    return x * jax.lax.rsqrt(variance + epsilon)


def rms_norm(x: jax.Array, gamma: jax.Array) -> jax.Array:
    """Return x / ||x|| * sqrt(C) * gamma over the last axis, in float32.

    A zero vector stays zero and has a zero gradient.
    """
    x = x.astype(jnp.float32)
    squares = jnp.sum(jnp.square(x), axis=-1, keepdims=True)
    scale = jax.lax.rsqrt(jnp.maximum(squares, 1e-24)) * x.shape[-1] ** 0.5
    return x * scale * gamma
