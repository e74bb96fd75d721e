"""Labels from logits, on the same grid or another: interpolation and decision."""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

SET = 1.5 * 2.0**-24  # logits above have a sigmoid above 0.5, in float32
CLOSE = 0.1  # difference of two probabilities below which both are likely
STEPS = 255  # of a probability that is kept as uint8


class Decided(NamedTuple):
    """Decisions for each voxel of a scan; None for those not requested.

    Attributes:
        labels: ids, uint8 [...].
        probability: of the label, float16 [...].
        close: whether the second class is within `CLOSE`, bool [...].
        chosen: probabilities of chosen classes in `STEPS`, uint8 [..., n].
    """

    labels: Any
    probability: Any = None
    close: Any = None
    chosen: Any = None

    def each(self, change: Any) -> "Decided":
        """Apply a function to each array that is not None."""
        return Decided(*(None if x is None else change(x) for x in self))

    def put(self, box: Any, part: "Decided") -> None:
        """Write a part into a box of these arrays."""
        for array, own in zip(self, part, strict=True):
            if array is not None:
                array[box] = np.asarray(own)


class Decision(NamedTuple):
    """How logits become labels.

    Attributes:
        interpolate: the values to interpolate to another grid, "probabilities" or, as
            nnU-Net does, "logits".
        regions: label ids of the channels of a network whose regions may overlap, such
            as a tumour and its core. A channel is set if its sigmoid is above 0.5, and
            later channels win. Empty for classes that exclude each other.
        one_vs_all: whether kept probabilities are those of `one_vs_all`. Labels are the
            same.
        confidence: whether to keep the labels' probabilities.
        chosen: label ids whose probabilities are kept.
    """

    interpolate: str = "probabilities"
    regions: tuple[int, ...] = ()
    one_vs_all: bool = False
    confidence: bool = False
    chosen: tuple[int, ...] = ()

    def labels(self, numpy: Any, values: Any) -> Any:
        """Return label ids, uint8 [...], of logits or probabilities [..., K].

        `numpy` is the module of the array: numpy or jax.numpy.
        """
        if not self.regions:
            return values.argmax(-1).astype(numpy.uint8)
        last = numpy.where(values > SET, numpy.arange(1, len(self.regions) + 1), 0)
        return numpy.asarray((0, *self.regions), numpy.uint8)[last.max(-1)]

    def decide(self, numpy: Any, values: Any, *, logits: bool) -> Decided:
        """Return the `Decided` of logits or probabilities [..., K].

        With regions, a label's probability is that its channel is set, or that no later
        one is, whichever is less likely. The second class is that of the flip.
        """
        labels = self.labels(numpy, values)
        probability = close = chosen = None
        share = values
        if (self.confidence or self.chosen) and self.regions:
            share = 1 / (1 + numpy.exp(-values))
        elif (self.confidence or self.chosen) and self.one_vs_all:
            share = one_vs_all(numpy, values, logits=logits)
        elif (self.confidence or self.chosen) and logits:
            share = softmax(numpy, values)
        if self.confidence and self.regions:
            first = _of_regions(numpy, values, share)
            probability, close = first, 2 * first - 1 < CLOSE
        elif self.confidence:
            first = share.max(-1)
            others = numpy.arange(share.shape[-1]) != labels[..., None]
            second = numpy.where(others, share, -1).max(-1)
            probability, close = first, first - second < CLOSE
        if self.chosen:
            ids = (*self.regions,) or range(share.shape[-1])
            channels = numpy.asarray([list(ids).index(i) for i in self.chosen])
            steps = numpy.rint(STEPS * share.take(channels, -1))
            chosen = steps.clip(0, STEPS).astype(numpy.uint8)
        if probability is not None:
            probability = probability.astype(numpy.float16)
        return Decided(labels, probability, close, chosen)

    def empty(self, shape: Sequence[int]) -> Decided:
        """Return arrays on the host for what `decide` keeps of a volume."""
        kept = (
            np.empty(shape, np.uint8),
            np.empty(shape, np.float16) if self.confidence else None,
            np.empty(shape, bool) if self.confidence else None,
            np.empty((*shape, len(self.chosen)), np.uint8) if self.chosen else None,
        )
        return Decided(*kept)


LARGEST = Decision()  # the class of the largest probability


def softmax(numpy: Any, logits: Any) -> Any:
    """Return the softmax of logits [..., K] along their last axis."""
    share = numpy.exp(logits - logits.max(-1, keepdims=True))
    return share / share.sum(-1, keepdims=True)


def one_vs_all(numpy: Any, values: Any, *, logits: bool) -> Any:
    """Return the probabilities of a network trained with sigmoids, [..., K].

    A class has the sigmoid of its logit minus the background's, which comes first. From
    interpolated softmax `values` it has its share of both. The background has what the
    most probable class leaves, so the sum is not 1.
    """
    first, others = values[..., :1], values[..., 1:]
    if logits:
        share = 0.5 + 0.5 * numpy.tanh(0.5 * (others - first))  # without overflow
    else:
        share = others / numpy.maximum(others + first, np.finfo(np.float32).tiny)
    return numpy.concatenate([1 - share.max(-1, keepdims=True), share], axis=-1)


def _of_regions(numpy, values, share):
    """Return the smallest probability that decides a label, [...].

    A label means that its channel is set and later ones are not.
    """
    channel = numpy.arange(values.shape[-1])
    last = numpy.where(values > SET, channel, -1).max(-1)[..., None]
    right = numpy.where(channel == last, share, 1 - share)
    return numpy.where(channel < last, 1, right).min(-1)


class Neighbours(NamedTuple):
    """The voxels on both sides of positions on an axis, and the second one's share."""

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
        plane = softmax(numpy, logits)
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
