"""What training minimises: cross-entropy plus a loss of the overlap of each class.

A new loss is a function of three sums by class and a line in `LOSSES`.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import jax
import jax.numpy as jnp
from jax import lax

from swinsmt_jax import checks

SMOOTH = 1e-5  # added to numerator and denominator of an overlap, as in MONAI
SPATIAL_AXES = (1, 2, 3)
BLOCK = 2**23  # logits of a sample that `Loss.of_features` holds at once

Overlap = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]


def soft_dice(
    predicted: jax.Array, intersection: jax.Array, truth: jax.Array
) -> jax.Array:
    """Return one minus soft Dice (Milletari et al. 2016), averaged as MONAI does.

    The average is over all (sample, class) pairs, the background and absent classes
    among them.

    Args:
        predicted: `[B, K]`, sum of a class' probability over the voxels of a sample.
        intersection: `[B, K]`, the same over the voxels that are of the class.
        truth: `[B, K]`, number of voxels that are of the class.
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

    An absent class costs 1 and has no slope (Liu et al. 2023, over whole volumes).
    """
    return (1 - 2 * intersection / (predicted + truth + 1)).mean()


class Head(Protocol):
    """What makes logits of features: a pytree.

    Attributes:
        num_classes: K.
        width: numbers of a voxel that it makes at once.
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
        """Return the head's gradient, of one by sample that is summed over planes."""
        ...


@dataclass(frozen=True)
class Loss:
    """Cross-entropy averaged over voxels plus `overlap`, in float32.

    The truth is never expanded to `[B, D, H, W, K]`: sums by class are taken over the
    probability of each voxel's true class. The backward pass recomputes probabilities.
    A label outside [0, K) makes the loss NaN; data are checked where they are read.

    Attributes:
        overlap: of (predicted, intersection, truth), see `soft_dice`.
        one_vs_all: probabilities are not a softmax, but for each class but the
            background the sigmoid of its logit minus the background's, of which the
            cross-entropy is the mean binary one; the sums are `[B, K - 1]`. The class
            of the largest logit is then the most probable one above 1/2, or else the
            background.
    """

    overlap: Overlap
    one_vs_all: bool = False

    def __call__(self, logits: jax.Array, labels: jax.Array) -> jax.Array:
        """Return the loss, a float32 scalar.

        Args:
            logits: `[B, D, H, W, K]`, any float dtype.
            labels: `[B, D, H, W]`, integers in [0, K).
        """
        labels = _class_ids(labels, "logits", logits, logits.shape[-1])
        return _loss(self, logits.astype(jnp.float32), None, labels)

    def of_features(
        self,
        features: jax.Array,
        kernel: jax.Array,
        bias: jax.Array,
        labels: jax.Array,
    ) -> jax.Array:
        """Return the loss of the logits `features @ kernel + bias` without the logits.

        With 118 classes the logits are the largest array of a training step, and their
        gradient is another. Here both are made for a few planes at a time, forward and
        once more backward. Equal up to the order of sums.

        Args:
            features: `[B, D, H, W, F]`, any float dtype, which the products have too.
            kernel: `[F, K]`.
            bias: `[K]`.
            labels: `[B, D, H, W]`, integers in [0, K).
        """
        head = kernel.astype(features.dtype), bias.astype(features.dtype)
        return self.of_head(features, _Dense(*head), labels)

    def of_head(self, features: jax.Array, head: Head, labels: jax.Array) -> jax.Array:
        """Return the loss of the logits `head(features)` likewise.

        Args:
            features: `[B, D, H, W, F]`.
            head: what makes logits of some planes of the features.
            labels: `[B, D, H, W]`, integers in [0, K).
        """
        labels = _class_ids(labels, "features", features, head.num_classes)
        return _loss(self, features, head, labels)


LOSSES = {
    "dice_ce": Loss(soft_dice),
    "tversky_ce": Loss(tversky),
    "one_vs_all": Loss(volume_dice, one_vs_all=True),
}


def make(name: str) -> Loss:
    """Return the loss of `training.loss`.

    Raises:
        UserError: for an unknown name, and a loss whose overlap is not one number.
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


def _class_ids(labels, name, array, num_classes):
    """Return labels as int32 in [0, K], where K stands for all that is out of range."""
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
    return jnp.where((labels >= 0) & (labels < num_classes), labels, num_classes)


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
def _loss(loss, features, head, labels):
    """The loss of features and a head, or of logits and None."""
    return _forward(loss, features, head, labels)[0]


def _forward(loss, features, head, labels):
    terms = _one_vs_all if loss.one_vs_all else _softmax

    def block(features, labels):
        return terms(_logits(features, head), labels)

    (kept, cost), sums = _over_blocks(block, (features, labels), head)
    value, slopes = jax.value_and_grad(loss.overlap, argnums=(0, 1))(*sums)
    # Row by row, since a long float32 sum on CPU is sequential and loses digits.
    value = value + cost.mean(3).mean(2).mean()
    return value, (features, head, labels, kept, slopes)


def _backward(loss, saved, cotangent):
    features, head, labels, kept, slopes = saved
    gradient = _one_vs_all_gradient if loss.one_vs_all else _softmax_gradient
    of_voxel = 1 / labels.size  # in the average of the cross-entropy

    def block(features, labels, kept):
        logits = _logits(features, head)
        g = cotangent * gradient(logits, labels, kept, slopes, of_voxel)
        if head is None:
            return g, None
        with jax.named_scope("head"):
            return head.pull_back(features, g)

    dfeatures, dhead = _over_blocks(block, (features, labels, kept), head)
    if head is not None:  # sums stay apart by sample, so by device, until here
        dhead = head.sum_samples(dhead)
    return dfeatures, dhead, None


_loss.defvjp(_forward, _backward)


def _softmax(logits, labels):
    """Return (kept for the gradient, cross-entropy) of voxels, and the sums."""
    log_total = jax.nn.logsumexp(logits, axis=-1)  # [B, planes, H, W]
    log_true = _at_label(logits, labels) - log_total
    predicted = jnp.exp(logits - log_total[..., None]).sum(SPATIAL_AXES)  # [B, K]
    sums = _sums_by_class(jnp.exp(log_true), labels, logits.shape[-1])
    return (log_total, -log_true), (predicted, *sums)


def _softmax_gradient(logits, labels, log_total, slopes, of_voxel):
    """Return the gradient in the logits.

    With p the probabilities and y the label, g_k = d overlap / d p_k is slope_k +
    [k = y] gain_y; the softmax turns it into p_k (g_k - sum_j p_j g_j).
    """
    slope, gain = slopes  # through the sizes of the prediction and of the intersection
    slope, log_total = slope[:, None, None, None, :], log_total[..., None]
    p = jnp.exp(logits - log_total)
    p_true = jnp.exp(_at_label(logits, labels)[..., None] - log_total)
    pull = p_true * _gain_of_label(gain, labels)[..., None]  # [B, planes, H, W, 1]
    mean_g = (p * slope).sum(-1, keepdims=True) + pull
    is_true = labels[..., None] == jnp.arange(logits.shape[-1])
    return p * (slope - mean_g + of_voxel) + is_true * (pull - of_voxel)


def _one_vs_all(logits, labels):
    """As `_softmax`, with binary cross-entropies; nothing is kept."""
    background, classes = logits[..., 0], logits.shape[-1] - 1
    z = logits[..., 1:] - background[..., None]
    z_true = _at_label(logits, labels) - background  # 0 in the background
    cost = (jax.nn.softplus(z).sum(-1) - z_true) / classes
    sums = _sums_by_class(jax.nn.sigmoid(z_true), labels, classes + 1)
    predicted = jax.nn.sigmoid(z).sum(SPATIAL_AXES)  # [B, K - 1]
    return (None, cost), (predicted, *(part[:, 1:] for part in sums))


def _one_vs_all_gradient(logits, labels, _, slopes, of_voxel):
    """As `_softmax_gradient`; with p the sigmoids, g_k is turned into p (1 - p) g."""
    slope, gain = (part[:, None, None, None, :] for part in slopes)
    p = jax.nn.sigmoid(logits[..., 1:] - logits[..., :1])
    is_true = labels[..., None] == jnp.arange(1, logits.shape[-1])
    g = p * (1 - p) * (slope + is_true * gain)
    g = g + (p - is_true) * of_voxel / p.shape[-1]
    return jnp.concatenate([-g.sum(-1, keepdims=True), g], axis=-1)


@jax.named_scope("head")
def _logits(features, head):
    return features if head is None else head(features)


def _over_blocks(block, arrays, head):
    """Apply `block` to a few planes of the arrays at a time; to all without a head.

    It returns two trees: values of voxels, which are put together, and of samples,
    which are summed.
    """
    features = arrays[0]
    _, depth, height, width, _ = features.shape
    count = depth
    if head is not None:
        most = max(1, BLOCK // (height * width * head.width))
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
    """Entry of `values [..., K]` at each label; NaN where there is none."""
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

    A scatter would queue all voxels of one class at one address, and is slow on TPU.
    """
    here = labels[..., None] == jnp.arange(num_classes)
    sums = jnp.where(here, values[..., None], 0).sum(SPATIAL_AXES)
    return sums, here.sum(SPATIAL_AXES, dtype=jnp.int32)


def sums_by_scatter(
    values: jax.Array, labels: jax.Array, *, num_classes: int
) -> tuple[jax.Array, jax.Array]:
    """Sum by class on CPU, which would write the comparison out (benchmarks/loss.py).

    One bin per row and class keeps the float32 sums short; one per class alone would
    lose three digits where one class fills the patch.
    """
    bins = jnp.zeros((*labels.shape[:3], num_classes))
    b, d, h = jnp.indices(labels.shape[:3], sparse=True)
    where = (b[..., None], d[..., None], h[..., None], labels)
    count = bins.astype(jnp.int32).at[where].add(1)
    return bins.at[where].add(values).sum((1, 2)), count.sum((1, 2))
