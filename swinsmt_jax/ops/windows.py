"""Windows of a token grid: shrink, pad, shift, partition, merge, relative positions.

Follows Swin Transformer (Liu et al. 2021) in three dimensions, as MONAI writes it.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

Triple = tuple[int, ...]  # (D, H, W)

# Added to the attention logits of tokens from different regions of a shifted grid.
DIFFERENT_REGION = -100.0


def fit_window(grid: Triple, window: Triple, shift: Triple) -> tuple[Triple, Triple]:
    """Shrink the window to the grid on every axis where the grid is not larger.

    Such an axis holds one window and loses its shift.

    Returns:
        window and shift, both (D, H, W) in tokens.
    """
    fits = [g > w for g, w in zip(grid, window, strict=True)]
    window = tuple(w if f else g for f, w, g in zip(fits, window, grid, strict=True))
    shift = tuple(s if f else 0 for f, s in zip(fits, shift, strict=True))
    return window, shift


def pad(x: jax.Array, window: Triple) -> jax.Array:
    """Pad [B, D, H, W, C] with zeros at the end, to multiples of the window."""
    widths = [(0, -n % w) for n, w in zip(x.shape[1:4], window, strict=True)]
    return jnp.pad(x, ((0, 0), *widths, (0, 0)))


def cyclic_shift(x: jax.Array, shift: Triple) -> jax.Array:
    """Roll [B, D, H, W, C] by `shift` tokens towards lower indices."""
    if not any(shift):
        return x
    return jnp.roll(x, tuple(-s for s in shift), axis=(1, 2, 3))


def partition(x: jax.Array, window: Triple) -> jax.Array:
    """Cut [B, D, H, W, C] into windows [B, W, n, C] of n tokens, both in C order."""
    b, d, h, w, c = x.shape
    p, q, r = window
    x = x.reshape(b, d // p, p, h // q, q, w // r, r, c)
    return jnp.einsum("bxpyqzrc->bxyzpqrc", x).reshape(b, -1, p * q * r, c)


def merge(windows: jax.Array, window: Triple, grid: Triple) -> jax.Array:
    """Put windows [B, W, n, C] back to [B, D, H, W, C]; the inverse of `partition`."""
    b, c = windows.shape[0], windows.shape[-1]
    d, h, w = grid
    p, q, r = window
    x = windows.reshape(b, d // p, h // q, w // r, p, q, r, c)
    return jnp.einsum("bxyzpqrc->bxpyqzrc", x).reshape(b, d, h, w, c)


@functools.lru_cache(maxsize=64)
def shift_regions(grid: Triple, window: Triple, shift: Triple) -> np.ndarray:
    """Number the regions that a cyclic shift brings together in one window.

    Tokens of one window attend to each other only if their numbers are equal.

    Args:
        grid: padded token grid (D, H, W), multiples of the window.
        window: (D, H, W) in tokens.
        shift: (D, H, W) in tokens; 0 leaves an axis undivided.

    Returns:
        int32 [W, n].
    """
    regions = np.zeros(grid, np.int32)
    for axis, (n, w, s) in enumerate(zip(grid, window, shift, strict=True)):
        index = np.arange(n)
        part = (index >= n - w).astype(np.int32) + (index >= n - s) if s else 0 * index
        shape = [1, 1, 1]
        shape[axis] = n
        regions = regions * 3 + part.reshape(shape)
    d, h, w = grid
    p, q, r = window
    cut = regions.reshape(d // p, p, h // q, q, w // r, r)
    return np.ascontiguousarray(cut.transpose(0, 2, 4, 1, 3, 5).reshape(-1, p * q * r))


@functools.lru_cache(maxsize=64)
def relative_position_index(window: Triple) -> np.ndarray:
    """Row of the relative-position table for every pair of tokens of a full window.

    Returns:
        int32 [n, n] with entries below prod(2 w - 1).
    """
    d, h, w = _offsets(window)
    _, q, r = window
    return ((d * (2 * q - 1) + h) * (2 * r - 1) + w).astype(np.int32)


@functools.lru_cache(maxsize=64)
def nnformer_position_index(window: Triple) -> np.ndarray:
    """Row of the table as nnFormer counts it, with factors 3 w - 1, 2 w - 1 and 1.

    Different offsets share rows and the last ones are never used; pretrained weights
    rely on it.

    Returns:
        int32 [n, n] with entries below prod(2 w - 1).
    """
    d, h, w = _offsets(window)
    q = window[1]
    return (d * (3 * q - 1) + h * (2 * q - 1) + w).astype(np.int32)


def _offsets(window):
    """How far one token is from another on each axis, from 0 on, [3, n, n]."""
    tokens = np.indices(window).reshape(3, -1)
    return tokens[:, :, None] - tokens[:, None] + np.reshape(window, (3, 1, 1)) - 1
