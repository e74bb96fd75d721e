"""Sliding-window inference over a whole scan, given a function that predicts windows.

The window's shape is part of the model. A Soft MoE mixes all tokens of its input, so a
window other than the training patch gives other results.
"""

import logging
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from swinsmt_jax import checks
from swinsmt_jax.inference import device_sums, grid, host_sums
from swinsmt_jax.inference.windows import Windows
from swinsmt_jax.runtime import host_memory

Predict = Callable[[jax.Array], jax.Array]
ACCUMULATE = ("auto", "host", "device")
SHARE_OF_SUMS = 0.4  # of an accelerator's free memory; the rest is the network's


def sliding_window(
    predict: Predict,
    volume: np.ndarray,
    *,
    window: Sequence[int],
    num_classes: int,
    overlap: float = 0.5,
    blend: str = "gaussian",
    convention: str = "monai",
    window_batch: int = 1,
    sharding: jax.sharding.Sharding | None = None,
) -> np.ndarray:
    """Average the windows' logits over a whole volume, float32 `[D, H, W, K]`.

    The result equals MONAI's `sliding_window_inference` or nnU-Net's predictor. A
    volume smaller than the window is padded with 0 (air, once HU are scaled to [0, 1]),
    and the result is cropped back.

    Args:
        predict: a jitted function `[b, *window, C] -> [b, *window, K]`. It is always
            called with b = window_batch; zeros fill the last batch.
        volume: `[D, H, W, C]`, float32.
        window: sides (D, H, W) of the window in voxels; the training patch.
        num_classes: K.
        overlap: share of a window that its neighbours cover too, in [0, 1).
        blend: "gaussian" or "constant" weights of a window's voxels.
        convention: "monai" or "nnunet", for places of windows and the Gaussian.
        window_batch: windows per call.
        sharding: of the batches; its devices must divide `window_batch`.

    Raises:
        UserError: for a volume of another rank, or options out of range.
    """
    windows = Windows(volume, window, overlap, blend, convention)
    windows.visit_last_in_turn()
    logits = np.empty((*volume.shape[:3], num_classes), np.float32)
    found = _predict_windows(predict, windows, num_classes, window_batch, sharding)
    for box, block in host_sums.blocks(windows, found, num_classes):
        windows.swept(logits)[box] = block
    return logits


def predict_labels(
    predict: Predict,
    volume: np.ndarray,
    **options: Any,
) -> np.ndarray:
    """Return the class of each voxel's largest averaged logit, uint8 `[D, H, W]`.

    Arguments as in `decide`.
    """
    return decide(predict, volume, **options).labels


def decide(
    predict: Predict,
    volume: np.ndarray,
    *,
    window: Sequence[int],
    num_classes: int,
    overlap: float = 0.5,
    blend: str = "gaussian",
    convention: str = "monai",
    window_batch: int = 1,
    sharding: jax.sharding.Sharding | None = None,
    positions: Sequence[np.ndarray] | None = None,
    fill: float = 0.0,
    decision: grid.Decision = grid.LARGEST,
    accum_dtype: str = "float32",
    accumulate: str = "auto",
    progress: Callable[[int, int], None] | None = None,
) -> grid.Decided:
    """Return each voxel's label and what else `decision` keeps, `[D, H, W]`.

    Arguments as in `sliding_window`. Windows come in layers along the axis with the
    smallest cross-section. Logits stay only while a further window can touch them: with
    overlap 0.5, half a window deep between two layers. Planes that no later window
    touches become labels.

    Args:
        positions: rising positions, in voxels of the volume, of another grid's planes,
            rows and columns. If given, probabilities are interpolated linearly to that
            grid, layer by layer, and the labels lie on it.
        fill: value that pads a volume smaller than the window.
        decision: how logits become labels, by default the class of the largest, and
            what else to keep.
        accum_dtype: "float16" halves the memory of the stored logits, and their
            precision.
        accumulate: where to store them: "host"; "device", which returns only labels;
            "auto" takes an accelerator if it has room. Results are equal up to
            rounding.
        progress: called after each window with the windows done and their total.
    """
    checks.in_range("num_classes", num_classes, 1, 256)
    checks.one_of("accum_dtype", accum_dtype, ("float32", "float16"))
    checks.one_of("accumulate", accumulate, ACCUMULATE)
    windows = Windows(volume, window, overlap, blend, convention, fill)
    if accumulate == "auto":
        fits = _fits_on_device(windows, num_classes, accum_dtype)
        accumulate = "device" if fits else "host"
    if accumulate == "host" and positions is None:
        windows.visit_last_in_turn()
    place = device_sums if accumulate == "device" else host_sums
    found = _predict_windows(predict, windows, num_classes, window_batch, sharding)
    if progress is not None:
        found = _counted(found, len(windows.starts), progress)
    if positions is None:
        decided = decision.empty(volume.shape[:3])
        swept = decided.each(windows.swept)
        for box, part in place.labels(
            windows, found, num_classes, accum_dtype, decision
        ):
            swept.put(box, part)
        return decided
    decided = decision.empty([len(axis) for axis in positions])
    swept, logits = decided.each(windows.swept), decision.interpolate == "logits"
    depth, *sides = (
        grid.neighbours(positions[axis], size)
        for axis, size in zip(windows.order, windows.shape, strict=True)
    )
    numpy = jnp if place is device_sums else np
    planes = place.planes(windows, found, num_classes, accum_dtype, decision, sides)
    for z, plane in grid.between(planes, depth):
        swept.put(z, decision.decide(numpy, plane, logits=logits))
    return decided


def _fits_on_device(windows, num_classes, dtype):
    """Whether an accelerator has room for the sums beside the network."""
    device = jax.local_devices()[0]
    if device.platform == "cpu":
        return False
    known = device.memory_stats() or {}
    free = known.get("bytes_limit", 0) - known.get("bytes_in_use", 0)
    needed = device_sums.needed_bytes(windows, num_classes, dtype)
    if needed <= SHARE_OF_SUMS * free:
        return True
    logging.getLogger(__name__).info(
        "logits are summed up in the host's memory, since %.1f GB of sums would take "
        "more than %.0f %% of the device's free %.1f GB.",
        needed / 1e9,
        100 * SHARE_OF_SUMS,
        free / 1e9,
    )
    return False


def _predict_windows(predict, windows, num_classes, window_batch, sharding):
    """Yield (logits of a batch, index in it) of each window, on one device.

    Windows that contain only zeros (air outside a scanner's field of view) share their
    logits, which are computed once.
    """
    host_memory.return_freed_blocks()
    checks.positive("window_batch", window_batch)
    devices = 1 if sharding is None else sharding.num_devices
    checks.require(
        window_batch % devices == 0,
        f"window_batch is {window_batch}, but must be a multiple of {devices}, the "
        "number of devices.",
    )

    def launch(starts):
        first = windows.cut(windows.starts[0])
        batch = np.zeros((window_batch, *first.shape), np.float32)
        for i, start in enumerate(starts):
            batch[i] = windows.cut(start)
        logits = predict(jax.device_put(batch, sharding))
        wanted = (*first.shape[:3], num_classes)
        checks.require(
            logits.shape[1:] == wanted,
            f"predict returned {logits.shape[1:]} for a window, but {wanted} is "
            f"needed: num_classes is {num_classes}.",
        )
        return logits, _are_finite(logits), len(starts)

    empty = {start for start in windows.starts if not windows.cut(start).any()}
    if len(empty) < 2:
        empty = set()
    filled = [start for start in windows.starts if start not in empty]
    groups = [filled[i : i + window_batch] for i in range(0, len(filled), window_batch)]
    of_air = None
    if empty:
        (logits, index), finite = next(_one_by_one(*launch([])[:2], 1))
        of_air = (logits[:1], index), finite
    predictions = _in_turn(launch, groups)
    for number, start in enumerate(windows.starts, start=1):
        found, finite = of_air if start in empty else next(predictions)
        checks.require(
            finite,
            f"the network's logits are NaN or infinite in window {number} of "
            f"{len(windows.starts)}, which begins at voxel {windows.place(start)} of "
            "what it sees. Take another checkpoint (--step), or compute in float32 "
            "(--dtype).",
        )
        yield found
        del found  # its memory is free for the windows to come


@jax.jit
def _are_finite(logits):
    """Return whether each window's logits are all finite, [b]."""
    return jnp.isfinite(logits).all(axis=range(1, logits.ndim))


def _in_turn(launch, groups) -> Iterator[tuple[tuple[jax.Array, int], bool]]:
    """Yield the windows of each group while the next group is computed."""
    waiting = None
    for group in [*groups, None]:
        launched = None if group is None else launch(group)
        if waiting is not None:
            yield from _one_by_one(*waiting)
        waiting = launched


def _one_by_one(logits, are_finite, count):
    """Yield ((part, index in it), finite) of a batch's first windows, on one device."""
    are_finite = np.asarray(are_finite)  # waits for the batch
    home = jax.local_devices()[0]
    parts = {s.index[0].start or 0: s.data for s in logits.addressable_shards}
    for first, part in sorted(parts.items()):
        part = jax.device_put(part, home)
        for i in range(min(len(part), count - first)):
            yield (part, i), are_finite[first + i]


def _counted(items, number, progress):
    for done in range(1, number + 1):
        yield next(items)  # without a name, which would keep it
        progress(done, number)
