"""Trilinear interpolation to a grid of other sides."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np


def resize(x: jax.Array, grid: Sequence[int]) -> jax.Array:
    """Interpolate [B, D, H, W, C] trilinearly to [B, *grid, C], with aligned corners.

    The first and the last voxel of each axis keep their places, and what lies between
    is read at equal distances, without smoothing where the grid shrinks. That is
    PyTorch's `align_corners=True`, which `jax.image.resize` has not.
    """
    for axis, side in enumerate(grid, start=1):
        before, after = x.shape[:axis], x.shape[axis + 1 :]
        if side != x.shape[axis]:
            weights = jnp.asarray(_weights(x.shape[axis], side), x.dtype)
            columns = x.reshape(*before, x.shape[axis], -1)
            y = jnp.einsum("oi,...ic->...oc", weights, columns)
            x = y.reshape(*before, side, *after)
    return x


def _weights(length, side):
    """Weights of `length` voxels in each of `side` new ones, [side, length]."""
    places = np.linspace(0, length - 1, side) if side > 1 else np.zeros(1)
    return np.maximum(0, 1 - np.abs(places[:, None] - np.arange(length)))
