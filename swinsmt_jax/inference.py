"""Sliding-window inference over a whole scan, given a function that predicts windows.

The window's shape is part of the model: a Soft MoE mixes all tokens of its input, so
another window gives other results than the patch that the network was trained with.
"""

from collections.abc import Callable, Iterator, Sequence

import jax
import numpy as np

from swinsmt_jax import checks
from swinsmt_jax.ops import patches

Predict = Callable[[jax.Array], jax.Array]


def sliding_window(
    predict: Predict,
    volume: np.ndarray,
    *,
    window: Sequence[int],
    num_classes: int,
    overlap: float = 0.5,
    blend: str = "gaussian",
    window_batch: int = 1,
    sharding: jax.sharding.Sharding | None = None,
) -> np.ndarray:
    """Average of the windows' logits over a whole volume, float32 `[D, H, W, K]`.

    Equals MONAI's `sliding_window_inference`: a volume smaller than the window is
    padded with 0 (air, after HU are scaled to [0, 1]) and the result cropped back.

    Args:
        predict: a jitted function `[b, *window, C] -> [b, *window, K]`. It is always
            called with b = window_batch: the last batch is filled up with zeros.
        volume: `[D, H, W, C]`, float32.
        window: sides (D, H, W) of the window in voxels; the training patch.
        num_classes: K.
        overlap: share of a window that neighbours have in common, in [0, 1).
        blend: "gaussian" or "constant" weights of a window's voxels.
        window_batch: windows per call.
        sharding: of the batches; its devices must divide `window_batch`.

    Raises:
        UserError: for a volume of another rank, or options out of range.
    """
    logits = np.empty((*volume.shape[:3], num_classes), np.float32)
    planes = _planes(
        predict, volume, window, num_classes, overlap, blend, window_batch, sharding
    )
    for z, plane in planes:
        logits[z] = plane
    return logits


def predict_labels(
    predict: Predict,
    volume: np.ndarray,
    *,
    window: Sequence[int],
    num_classes: int,
    overlap: float = 0.5,
    blend: str = "gaussian",
    window_batch: int = 1,
    sharding: jax.sharding.Sharding | None = None,
    positions: Sequence[np.ndarray] | None = None,
) -> np.ndarray:
    """Class of the largest averaged logit of each voxel, uint8 `[D, H, W]`.

    Arguments as in `sliding_window`. Logits are kept only while a further window can
    touch them, in a slab `window[0]` planes deep, and become labels behind it.

    Args:
        positions: where the planes, rows and columns of another grid lie on the
            volume's, in voxels and rising. Given, probabilities are interpolated
            linearly to that grid, plane by plane, and the labels are its.
    """
    checks.in_range("num_classes", num_classes, 1, 256)
    planes = _planes(
        predict, volume, window, num_classes, overlap, blend, window_batch, sharding
    )
    shape = volume.shape[:3]
    if positions is not None:
        planes = _interpolated(planes, shape, positions)
        shape = tuple(len(axis) for axis in positions)
    labels = np.empty(shape, np.uint8)
    for z, plane in planes:
        labels[z] = plane.argmax(axis=-1)
    return labels


def _planes(
    predict, volume, window, num_classes, overlap, blend, window_batch, sharding
) -> Iterator[tuple[int, np.ndarray]]:
    """Yield each plane z of the volume with its averaged logits `[H, W, K]`.

    Windows come in order of their first plane, so everything before the present
    window is final. The slab is a ring: plane z is kept at z modulo its depth.
    """
    _check(volume, window, window_batch, sharding)
    pad = patches.padding(volume.shape[:3], window)
    padded = np.pad(volume, (*pad, (0, 0)))
    starts = patches.window_starts(padded.shape[:3], window, overlap=overlap)
    weight = patches.importance(window, blend=blend)[..., None]
    depth, height, width = window
    total = np.zeros((depth, *padded.shape[1:3], num_classes), np.float32)
    weights = np.zeros((depth, *padded.shape[1:3], 1), np.float32)
    rows, columns = (
        slice(before, before + n)
        for (before, _), n in zip(pad[1:], volume.shape[1:3], strict=True)
    )

    def finish(first, last):
        for z in range(first, last):
            here = z % depth
            if 0 <= z - pad[0][0] < volume.shape[0]:
                plane = total[here] / weights[here]
                yield z - pad[0][0], plane[rows, columns]
            total[here], weights[here] = 0, 0

    front = 0
    batches = _predict_windows(predict, padded, starts, window, window_batch, sharding)
    for (z, y, x), logits in zip(starts, batches, strict=True):
        checks.require(
            logits.shape == (*window, num_classes),
            f"predict returned {logits.shape} for a window {tuple(window)}, but "
            f"num_classes is {num_classes}.",
        )
        yield from finish(front, z)
        front = z
        ring = np.arange(z, z + depth) % depth
        box = (slice(y, y + height), slice(x, x + width))
        for i, here in enumerate(ring):
            total[here][box] += logits[i] * weight[i]
            weights[here][box] += weight[i]
    yield from finish(front, padded.shape[0])


def _interpolated(planes, shape, positions):
    """Yield the planes of another grid with probabilities in place of logits."""
    depth, *sides = (_neighbours(p, n) for p, n in zip(positions, shape, strict=True))
    waiting, known = 0, {}
    for z, logits in planes:
        plane = np.exp(logits - logits.max(-1, keepdims=True))
        plane /= plane.sum(-1, keepdims=True)
        for axis, (low, high, share) in enumerate(sides):
            share = share[:, None, None] if axis == 0 else share[:, None]
            plane = plane.take(low, axis) * (1 - share) + plane.take(high, axis) * share
        known = {z: plane} | {i: p for i, p in known.items() if i == z - 1}
        low, high, share = depth
        while waiting < len(low) and high[waiting] <= z:
            below, above = known[low[waiting]], known[high[waiting]]
            weight = share[waiting]
            yield waiting, below if weight == 0 else below + weight * (above - below)
            waiting += 1


def _neighbours(positions, size):
    """Return the voxels on both sides of each position, and the share of the second."""
    inside = np.clip(np.asarray(positions, np.float64), 0, size - 1)
    low = np.floor(inside).astype(int)
    share = (inside - low).astype(np.float32)
    return low, np.where(share > 0, np.minimum(low + 1, size - 1), low), share


def _predict_windows(predict, volume, starts, window, window_batch, sharding):
    """Yield the logits of the windows, one batch computed while the last is used."""
    waiting = None
    for first in range(0, len(starts), window_batch):
        group = starts[first : first + window_batch]
        batch = np.zeros((window_batch, *window, volume.shape[-1]), np.float32)
        for i, start in enumerate(group):
            box = tuple(slice(s, s + w) for s, w in zip(start, window, strict=True))
            batch[i] = volume[box]
        logits = predict(jax.device_put(batch, sharding))
        if waiting is not None:
            yield from np.asarray(waiting)
        waiting = logits[: len(group)]
    yield from np.asarray(waiting)


def _check(volume, window, window_batch, sharding):
    checks.require(
        volume.ndim == 4 and len(window) == 3,
        f"volume has shape {volume.shape} and window {tuple(window)}, but the volume "
        "must be [D, H, W, C] and the window (D, H, W).",
    )
    checks.positive("window_batch", window_batch)
    devices = 1 if sharding is None else sharding.num_devices
    checks.require(
        window_batch % devices == 0,
        f"window_batch is {window_batch}, but must be a multiple of {devices}, the "
        "number of devices.",
    )
