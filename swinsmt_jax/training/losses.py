"""The training loss: cross-entropy plus a loss of the overlap of each class.

A new loss is a function of three sums by class and a line in `LOSSES`.

If a case annotates only some classes, a voxel labelled background may belong to any
other class. Its softmax covers the annotated classes and one more, whose probability
sums the background and the other classes. This is the marginal loss of Shi et al.
(2021, Medical Image Analysis 70, 101979) and the target adaptive loss of Fang and Yan
(2020, IEEE TMI 39, 3619). Losses with one sigmoid per class leave out the other classes
(Liu et al. 2023, masked back-propagation). Voxels with the label `IGNORED` never count.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import jax
import jax.numpy as jnp
from jax import lax

from swinsmt_jax import checks
from swinsmt_jax.labels import IGNORED
from swinsmt_jax.ops import by_platform

SMOOTH = 1e-5  # added to numerator and denominator of an overlap, as in MONAI
SPATIAL_AXES = (1, 2, 3)
NOTHING = -1e30  # the logit of what cannot be
OUT = 2**30  # the label of voxels that do not count, beyond all classes

Overlap = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]


def soft_dice(
    predicted: jax.Array, intersection: jax.Array, truth: jax.Array
) -> jax.Array:
    """Return one minus soft Dice (Milletari et al. 2016), averaged as MONAI does.

    The average covers all (sample, class) pairs, including the background and absent
    classes.

    Args:
        predicted: `[B, K]`, sum of a class's probability over the voxels of a sample.
        intersection: `[B, K]`, the same over the voxels of the class.
        truth: `[B, K]`, number of voxels of the class.
    """
    dice = (2 * intersection + SMOOTH) / (predicted + truth + SMOOTH)
    return (1 - dice).mean()


def tversky(
    predicted: jax.Array, intersection: jax.Array, truth: jax.Array
) -> jax.Array:
    """Return one minus the Tversky index (Salehi et al. 2017); arguments as above.

    Missed voxels weigh 0.7 and wrongly predicted ones 0.3, for small structures.
    """
    missed, wrong = truth - intersection, predicted - intersection
    found = intersection + SMOOTH
    return (1 - found / (found + 0.7 * missed + 0.3 * wrong)).mean()


def volume_dice(
    predicted: jax.Array, intersection: jax.Array, truth: jax.Array
) -> jax.Array:
    """Return one minus soft Dice with 1 in its denominator; arguments as above.

    An absent class costs 1 without a slope (Liu et al. 2023, over whole volumes).
    """
    return (1 - 2 * intersection / (predicted + truth + 1)).mean()


class Head(Protocol):
    """A pytree that computes logits from features.

    Attributes:
        num_classes: K.
        width: numbers per voxel that it computes at once.
    """

    @property
    def num_classes(self) -> int: ...  # noqa: D102

    @property
    def width(self) -> int: ...  # noqa: D102

    def __call__(self, features: jax.Array) -> jax.Array:
        """Map some planes of features, [B, d, H, W, F], to float32 [B, d, H, W, K]."""
        ...

    def pull_back(self, features: jax.Array, g: jax.Array) -> tuple:
        """Return the gradients of features and head, the latter by sample."""
        ...

    def sum_samples(self, gradient: Any) -> Any:
        """Return the head's gradient from one by sample, summed over planes."""
        ...


@dataclass(frozen=True)
class Loss:
    """Cross-entropy averaged over voxels plus `overlap`, in float32.

    The truth is never expanded to `[B, D, H, W, K]`. Instead, sums by class add the
    probability of each voxel's true class. The backward pass recomputes probabilities.
    A label outside [0, K) makes the loss NaN; the readers check the data. With
    `annotated` the averages cover only annotated voxels and pairs.

    Attributes:
        overlap: of (predicted, intersection, truth), see `soft_dice`.
        one_vs_all: no softmax; each class except the background has the sigmoid of its
            logit minus the background's. The cross-entropy is the mean binary one, and
            the sums are `[B, K - 1]`. The class of the largest logit is then the most
            probable one above 1/2, or else the background.
    """

    overlap: Overlap
    one_vs_all: bool = False

    def __call__(
        self,
        logits: jax.Array,
        labels: jax.Array,
        annotated: jax.Array | None = None,
    ) -> jax.Array:
        """Return the loss, a float32 scalar.

        Args:
            logits: `[B, D, H, W, K]`, any float dtype.
            labels: `[B, D, H, W]`, integers in [0, K).
            annotated: bool `[B, K]`, the classes that each sample annotates; a label
                may then also be `IGNORED`. None if all voxels are annotated.
        """
        truth = _class_ids(labels, "logits", logits, logits.shape[-1], annotated)
        return _loss(self, logits.astype(jnp.float32), None, *truth)

    def of_features(
        self,
        features: jax.Array,
        kernel: jax.Array,
        bias: jax.Array,
        labels: jax.Array,
        annotated: jax.Array | None = None,
    ) -> jax.Array:
        """Return the loss of logits `features @ kernel + bias` without making these.

        With 118 classes the logits and their gradient are the largest arrays of a
        training step. This method makes both for a few planes at a time, forward and
        again backward. The result is equal up to the order of sums.

        Args:
            features: `[B, D, H, W, F]`, any float dtype; products have the same dtype.
            kernel: `[F, K]`.
            bias: `[K]`.
            labels, annotated: as in a call.
        """
        head = kernel.astype(features.dtype), bias.astype(features.dtype)
        return self.of_head(features, _Dense(*head), labels, annotated)

    def of_head(
        self,
        features: jax.Array,
        head: Head,
        labels: jax.Array,
        annotated: jax.Array | None = None,
    ) -> jax.Array:
        """Return the loss of logits `head(features)` in the same way.

        Args:
            features: `[B, D, H, W, F]`.
            head: computes logits from some planes of the features.
            labels, annotated: as in a call.
        """
        number = head.num_classes
        truth = _class_ids(labels, "features", features, number, annotated)
        return _loss(self, features, head, *truth)


LOSSES = {
    "dice_ce": Loss(soft_dice),
    "tversky_ce": Loss(tversky),
    "one_vs_all": Loss(volume_dice, one_vs_all=True),
}


def make(name: str) -> Loss:
    """Return the loss of `training.loss`.

    Raises:
        UserError: for an unknown name, and a loss whose overlap is not a scalar.
    """
    checks.one_of("training.loss", name, LOSSES)
    loss, sums = LOSSES[name], jax.ShapeDtypeStruct((1, 3), jnp.float32)
    checks.require(
        isinstance(loss, Loss)
        and jax.eval_shape(loss.overlap, sums, sums, sums).shape == (),
        f"LOSSES[{name!r}] is {loss!r}, but must be Loss(function) of a function that "
        "returns one number.",
    )
    return loss


def _class_ids(labels, name, array, num_classes, annotated):
    """Return labels as int32 in [0, K], with K if out of range, and `annotated`.

    With `annotated`, other classes become background and ignored voxels `OUT`.
    """
    checks.require(
        array.ndim == 5 and labels.shape == array.shape[:-1],
        f"labels have shape {labels.shape} and {name} {array.shape}, but {name} must "
        "be [B, D, H, W, channels] and labels [B, D, H, W] of the same voxels.",
    )
    checks.require(
        jnp.issubdtype(labels.dtype, jnp.integer),
        f"labels have dtype {labels.dtype}, but must be integer class ids.",
    )
    labels = labels.astype(jnp.int32)
    ids = jnp.where((labels >= 0) & (labels < num_classes), labels, num_classes)
    if annotated is None:
        return ids, None
    annotated = jnp.asarray(annotated, bool)
    checks.require(
        annotated.shape == (len(labels), num_classes),
        f"annotated has shape {annotated.shape}, but must be [B, K], here "
        f"{(len(labels), num_classes)}.",
    )
    unknown = ~jnp.pad(annotated, ((0, 0), (0, 1)), constant_values=True)
    ids = jnp.where(_gain_of_label(unknown, ids), 0, ids)
    return jnp.where(labels == IGNORED, OUT, ids), annotated


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=("kernel", "bias"),
    meta_fields=(),
)
@dataclass(frozen=True, eq=False)
class _Dense:
    """The head `features @ kernel + bias`."""

    kernel: jax.Array
    bias: jax.Array

    num_classes = width = property(lambda self: self.bias.size)

    def __call__(self, features: jax.Array) -> jax.Array:
        return (features @ self.kernel + self.bias).astype(jnp.float32)

    def pull_back(self, features: jax.Array, g: jax.Array) -> tuple:
        """Return the gradients of the features and, by sample, of the head."""
        g = g.astype(features.dtype)
        dkernel = jnp.einsum(
            "bxyzc,bxyzo->bco", features, g, preferred_element_type=jnp.float32
        )
        dbias = g.sum(SPATIAL_AXES, dtype=jnp.float32)
        return g @ self.kernel.T, _Dense(dkernel, dbias)

    def sum_samples(self, gradient: Any) -> Any:
        def total(parts, own):
            return parts.sum(0).astype(own.dtype)

        return jax.tree.map(total, gradient, self)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _loss(loss, features, head, labels, annotated):
    """Return the loss of features and a head, or of logits and None."""
    return _forward(loss, features, head, labels, annotated)[0]


def _forward(loss, features, head, labels, annotated):
    terms = _one_vs_all if loss.one_vs_all else _softmax
    overlap = loss.overlap
    if annotated is not None:
        pairs = annotated.at[:, 0].set(True)[:, int(loss.one_vs_all) :]
        overlap = functools.partial(_over_pairs, overlap, pairs)

    def block(features, labels):
        return terms(_logits(features, head), labels, annotated)

    (kept, cost), sums = _over_blocks(block, (features, labels), head)
    value, slopes = jax.value_and_grad(overlap, argnums=(0, 1))(*sums)
    # Row by row, since a long float32 sum on CPU is sequential and loses digits.
    if annotated is None:
        value = value + cost.mean(3).mean(2).mean()
    else:
        value = value + cost.sum(3).sum(2).sum() * _of_voxel(labels, annotated)
    return value, (features, head, labels, annotated, kept, slopes)


def _of_voxel(labels, annotated):
    """Return the weight of a voxel in the average of the cross-entropy."""
    if annotated is None:
        return 1 / labels.size
    return 1 / jnp.maximum((labels != OUT).sum(dtype=jnp.float32), 1)


def _over_pairs(overlap, pairs, *sums):
    """Return a loss of the overlap, averaged over some (sample, class) pairs only.

    The others get sums of 0, and their part of the mean over all is subtracted.
    """
    share = pairs.mean(dtype=jnp.float32)
    absent = jnp.zeros_like(sums[0])
    value = overlap(*(jnp.where(pairs, part, 0) for part in sums))
    value = value - (1 - share) * overlap(absent, absent, absent)
    return value / jnp.maximum(share, 1 / pairs.size)


def _backward(loss, saved, cotangent):
    features, head, labels, annotated, kept, slopes = saved
    gradient = _one_vs_all_gradient if loss.one_vs_all else _softmax_gradient
    of_voxel = _of_voxel(labels, annotated)

    def block(features, labels, kept):
        logits = _logits(features, head)
        g = gradient(logits, labels, annotated, kept, slopes, of_voxel)
        if annotated is not None:
            g = _counted(g, labels, annotated)
        g = cotangent * g
        if head is None:
            return g, None
        with jax.named_scope("head"):
            return head.pull_back(features, g)

    dfeatures, dhead = _over_blocks(block, (features, labels, kept), head)
    if head is not None:  # sums stay apart by sample, so by device, until here
        dhead = head.sum_samples(dhead)
    return dfeatures, dhead, None, None


_loss.defvjp(_forward, _backward)


def _counted(values, labels, annotated):
    """Return values of voxels `[B, D, H, W, ...]`, 0 where they are ignored."""
    if annotated is None:
        return values
    labels = labels.reshape(labels.shape + (1,) * (values.ndim - labels.ndim))
    return jnp.where(labels != OUT, values, 0)


def _joined(logits, annotated):
    """Return logits whose background also covers all unannotated classes.

    Those classes have probability 0. Also return which they are, bool `[B, 1, 1, 1,
    K]`, including the background.
    """
    others = ~annotated.at[:, 0].set(False)[:, None, None, None, :]
    joint = jax.nn.logsumexp(jnp.where(others, logits, NOTHING), axis=-1)
    logits = jnp.where(others, NOTHING, logits)
    return logits.at[..., 0].set(joint), others


def _softmax(logits, labels, annotated):
    """Return (kept for the gradient, cross-entropy) of voxels, and the sums."""
    if annotated is not None:
        logits, _ = _joined(logits, annotated)
    log_total = jax.nn.logsumexp(logits, axis=-1)  # [B, planes, H, W]
    log_true = _at_label(logits, labels) - log_total
    probability = jnp.exp(logits - log_total[..., None])
    predicted = _counted(probability, labels, annotated).sum(SPATIAL_AXES)  # [B, K]
    sums = _sums_by_class(jnp.exp(log_true), labels, logits.shape[-1])
    return (log_total, _counted(-log_true, labels, annotated)), (predicted, *sums)


def _softmax_gradient(given, labels, annotated, log_total, slopes, of_voxel):
    """Return the gradient with respect to the logits.

    With probabilities p and label y, g_k = d overlap / d p_k is slope_k + [k = y]
    gain_y. The softmax turns it into p_k (g_k - sum_j p_j g_j). The joint background's
    gradient is divided among its classes by their shares.
    """
    logits = given if annotated is None else _joined(given, annotated)[0]
    slope, gain = slopes  # through the sizes of the prediction and of the intersection
    slope, log_total = slope[:, None, None, None, :], log_total[..., None]
    p = jnp.exp(logits - log_total)
    p_true = jnp.exp(_at_label(logits, labels)[..., None] - log_total)
    pull = p_true * _gain_of_label(gain, labels)[..., None]  # [B, planes, H, W, 1]
    mean_g = (p * slope).sum(-1, keepdims=True) + pull
    is_true = labels[..., None] == jnp.arange(logits.shape[-1])
    g = p * (slope - mean_g + of_voxel) + is_true * (pull - of_voxel)
    if annotated is None:
        return g
    joint, (_, others) = logits[..., :1], _joined(given, annotated)
    return jnp.where(others, g[..., :1] * jnp.exp(given - joint), g)


def _one_vs_all(logits, labels, annotated):
    """As `_softmax`, with binary cross-entropies; nothing is kept."""
    background = logits[..., 0]
    z = logits[..., 1:] - background[..., None]
    z_true = _at_label(logits, labels) - background  # 0 in the background
    wanted, classes = _classes_of(annotated, logits)
    cost = ((jax.nn.softplus(z) * wanted).sum(-1) - z_true) / classes
    sums = _sums_by_class(jax.nn.sigmoid(z_true), labels, logits.shape[-1])
    probability = _counted(jax.nn.sigmoid(z), labels, annotated)
    predicted = probability.sum(SPATIAL_AXES)  # [B, K - 1]
    cost = _counted(cost, labels, annotated)
    return (None, cost), (predicted, *(part[:, 1:] for part in sums))


def _classes_of(annotated, logits):
    """Return the weight of each class but the background, and their sum."""
    if annotated is None:
        return 1, logits.shape[-1] - 1
    wanted = annotated[:, None, None, None, 1:].astype(logits.dtype)
    return wanted, jnp.maximum(wanted.sum(-1), 1)


def _one_vs_all_gradient(logits, labels, annotated, _, slopes, of_voxel):
    """As `_softmax_gradient`; sigmoids p turn g_k into p (1 - p) g."""
    slope, gain = (part[:, None, None, None, :] for part in slopes)
    p = jax.nn.sigmoid(logits[..., 1:] - logits[..., :1])
    is_true = labels[..., None] == jnp.arange(1, logits.shape[-1])
    g = p * (1 - p) * (slope + is_true * gain)
    wanted, classes = _classes_of(annotated, logits)
    classes = classes if annotated is None else classes[..., None]
    g = g + (p - is_true) * wanted * of_voxel / classes
    return jnp.concatenate([-g.sum(-1, keepdims=True), g], axis=-1)


@jax.named_scope("head")
def _logits(features, head):
    return features if head is None else head(features)


def _over_blocks(block, arrays, head):
    """Apply `block` to a few planes of the arrays at a time; to all without a head.

    It returns two trees: values of voxels, which are concatenated, and of samples,
    which are summed.
    """
    features = arrays[0]
    _, depth, height, width, _ = features.shape
    count = depth
    if head is not None:
        entries = by_platform.entries_at_a_time()
        most = max(1, entries // (height * width * head.width))
        count = max(n for n in checks.divisors(depth) if n <= most)
    if count == depth:
        return block(*arrays)

    def block_at(start):
        def cut(array):
            return lax.dynamic_slice_in_dim(array, start, count, 1)

        return block(*jax.tree.map(cut, arrays))

    def body(index, found):
        def put(whole, part):
            return lax.dynamic_update_slice_in_dim(whole, part, index * count, 1)

        parts, sums = block_at(index * count)
        return jax.tree.map(put, found[0], parts), jax.tree.map(jnp.add, found[1], sums)

    def empty(part):
        # Made of the features, since XLA makes constants at the start of the program,
        # where they take memory until they are overwritten.
        one = features[:, :1, :1, :1, :1].reshape(-1, *(1,) * (part.ndim - 1))
        shape = (part.shape[0], depth, *part.shape[2:])
        return jnp.broadcast_to(one, shape).astype(part.dtype)

    parts, sums = jax.eval_shape(block_at, 0)
    zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), sums)
    found = jax.tree.map(empty, parts), zeros
    return lax.fori_loop(0, depth // count, body, found)


def _at_label(values, labels):
    """Return the entry of `values [..., K]` at each label; NaN if it has none."""
    return jnp.take_along_axis(values, labels[..., None], axis=-1)[..., 0]


def _gain_of_label(gain, labels):
    flat = labels.reshape(labels.shape[0], -1)
    return jnp.take_along_axis(gain, flat, axis=1).reshape(labels.shape)


def _sums_by_class(values, labels, num_classes):
    """Sums of `values [B, D, H, W]` and numbers of voxels by class, each `[B, K]`."""
    sums, count = jax.lax.platform_dependent(
        values,
        labels,
        cpu=functools.partial(sums_by_scatter, num_classes=num_classes),
        default=functools.partial(sums_by_comparison, num_classes=num_classes),
    )
    return sums, count.astype(jnp.float32)


def sums_by_comparison(
    values: jax.Array, labels: jax.Array, *, num_classes: int
) -> tuple[jax.Array, jax.Array]:
    """Sum by class on accelerators, which fuse the comparison into the reduction.

    A scatter would queue all voxels of a class at one address, and is slow on TPU.
    """
    here = labels[..., None] == jnp.arange(num_classes)
    sums = jnp.where(here, values[..., None], 0).sum(SPATIAL_AXES)
    return sums, here.sum(SPATIAL_AXES, dtype=jnp.int32)


def sums_by_scatter(
    values: jax.Array, labels: jax.Array, *, num_classes: int
) -> tuple[jax.Array, jax.Array]:
    """Sum by class on a CPU, which would store the comparison (benchmarks/loss.py).

    One bin per row and class keeps the float32 sums short. One bin per class would lose
    three digits if one class fills the patch.
    """
    bins = jnp.zeros((*labels.shape[:3], num_classes))
    b, d, h = jnp.indices(labels.shape[:3], sparse=True)
    where = (b[..., None], d[..., None], h[..., None], labels)
    count = bins.astype(jnp.int32).at[where].add(1)
    return bins.at[where].add(values).sum((1, 2)), count.sum((1, 2))
