"""Labels of logits, on their grid or on another: linear interpolation and decision."""

from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import numpy as np

SET = 1.5 * 2.0**-24  # logits above have a sigmoid above 0.5, in float32


class Decision(NamedTuple):
    """How logits become labels.

    Attributes:
        interpolate: "probabilities" or, as nnU-Net does, "logits": what is interpolated
            to another grid.
        regions: label ids of the channels of a network of regions that may overlap,
            such as a tumour and its core: a channel is set where its sigmoid is above
            0.5, and later ones win. Empty for classes that exclude each other.
    """

    interpolate: str = "probabilities"
    regions: tuple[int, ...] = ()

    def labels(self, numpy: Any, values: Any) -> Any:
        """Return label ids, uint8 [...], of logits or probabilities [..., K].

        `numpy` is the module of the array: numpy or jax.numpy.
        """
        if not self.regions:
            return values.argmax(-1).astype(numpy.uint8)
        last = numpy.where(values > SET, numpy.arange(1, len(self.regions) + 1), 0)
        return numpy.asarray((0, *self.regions), numpy.uint8)[last.max(-1)]


LARGEST = Decision()  # the class of the largest probability


class Neighbours(NamedTuple):
    """Voxels on both sides of positions on an axis, and the share of the second."""

    low: np.ndarray
    high: np.ndarray
    share: np.ndarray


def neighbours(positions: np.ndarray, size: int) -> Neighbours:
    """Return the voxels beside each position; beyond the axis, its first or last."""
    inside = np.clip(np.asarray(positions, np.float64), 0, size - 1)
    low = np.floor(inside).astype(int)
    share = (inside - low).astype(np.float32)
    return Neighbours(
        low, np.where(share > 0, np.minimum(low + 1, size - 1), low), share
    )


def interpolated(
    numpy: Any,
    logits: Any,
    rows: Neighbours,
    columns: Neighbours,
    *,
    decision: Decision,
) -> Any:
    """Interpolate a plane's logits [H, W, K], or their softmax, to rows and columns.

    `numpy` is the module of the array: numpy or jax.numpy.
    """
    plane = logits
    if decision.interpolate == "probabilities":
        plane = numpy.exp(logits - logits.max(-1, keepdims=True))
        plane /= plane.sum(-1, keepdims=True)
    for axis, (low, high, share) in enumerate((rows, columns)):
        share = share[:, None, None] if axis == 0 else share[:, None]
        plane = plane.take(low, axis) * (1 - share) + plane.take(high, axis) * share
    return plane


def between(planes: Iterable, depth: Neighbours) -> Iterator:
    """Yield (index, plane) at each position between planes (z, plane) in order."""
    waiting = 0
    known: dict = {}
    for z, plane in planes:
        known = {z: plane} | {i: p for i, p in known.items() if i == z - 1}
        while waiting < len(depth.low) and depth.high[waiting] <= z:
            below, above = known[depth.low[waiting]], known[depth.high[waiting]]
            share = depth.share[waiting]
            yield waiting, below if share == 0 else below + share * (above - below)
            waiting += 1
