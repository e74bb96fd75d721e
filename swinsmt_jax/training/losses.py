"""Dice plus cross-entropy: what training minimises."""

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax

from swinsmt_jax import checks

SMOOTH = 1e-5  # added to numerator and denominator of Dice, as in MONAI
VOXELS = (1, 2, 3)
BLOCK = 2**23  # logits of a sample that `dice_cross_entropy_of_features` holds at once


def dice_cross_entropy(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """Soft Dice loss plus cross-entropy, in float32.

    Equals MONAI's `DiceCELoss(to_onehot_y=True, softmax=True)`: one minus soft Dice,
    averaged over all (sample, class) pairs, the background and absent classes among
    them, plus the cross-entropy averaged over voxels.

    The truth is never expanded to `[B, D, H, W, K]`: per-class sums are taken over the
    probability of each voxel's true class. The backward pass recomputes the
    probabilities from the logits, so that logits are all it keeps of that size.

    Args:
        logits: `[B, D, H, W, K]`, any float dtype.
        labels: `[B, D, H, W]`, integers in [0, K). A label of K or more makes the loss
            NaN; the data edge is where labels are checked.

    Returns:
        The loss, a float32 scalar.
    """
    _require_same_voxels("logits", logits, labels)
    return _loss(logits.astype(jnp.float32), labels.astype(jnp.int32))


def dice_cross_entropy_of_features(
    features: jax.Array, kernel: jax.Array, bias: jax.Array, labels: jax.Array
) -> jax.Array:
    """Return `dice_cross_entropy(features @ kernel + bias, labels)` without the logits.

    With 118 classes the logits are the largest array of a training step, and their
    gradient is another. Here both are made for a few planes at a time, forward and once
    more backward; the features are all that is kept. Equal up to the order of sums.

    Args:
        features: `[B, D, H, W, F]`, any float dtype. The products are of this dtype.
        kernel: `[F, K]`.
        bias: `[K]`.
        labels: as in `dice_cross_entropy`.

    Returns:
        The loss, a float32 scalar.
    """
    _require_same_voxels("features", features, labels)
    dtype = features.dtype
    parameters = kernel.astype(dtype), bias.astype(dtype)
    return _loss_of_features(features, *parameters, labels.astype(jnp.int32))


def _require_same_voxels(name, array, labels):
    checks.require(
        array.ndim == 5 and labels.shape == array.shape[:-1],
        f"labels have shape {labels.shape} and {name} {array.shape}, but {name} must "
        "be [B, D, H, W, channels] and labels [B, D, H, W] of the same voxels.",
    )
    checks.require(
        jnp.issubdtype(labels.dtype, jnp.integer),
        f"labels have dtype {labels.dtype}, but must be integer class ids.",
    )


@jax.custom_vjp
def _loss(logits, labels):
    return _forward(logits, labels)[0]


def _forward(logits, labels):
    log_total, log_true, *sums = _sums(logits, labels)
    loss, slopes = _loss_of_sums(log_true, *sums)
    return loss, (logits, labels, log_total, slopes)


def _backward(saved, cotangent):
    return cotangent * _gradient(*saved), None


_loss.defvjp(_forward, _backward)


def _sums(logits, labels):
    """Return by voxel log of total and of the true class, by class the sums of Dice."""
    log_total = jax.nn.logsumexp(logits, axis=-1)  # [B, D, H, W]
    log_true = _at_label(logits, labels) - log_total
    predicted = jnp.exp(logits - log_total[..., None]).sum(VOXELS)  # [B, K]
    both = _sums_by_class(jnp.exp(log_true), labels, logits.shape[-1])
    return log_total, log_true, predicted, *both


def _loss_of_sums(log_true, predicted, intersection, truth):
    """Return the loss, and the slopes of Dice through each of its parts, [B, K].

    With p the probabilities and y the label, d loss / d p_k = slope_k + [k = y] gain_y.
    """
    size = predicted + truth + SMOOTH
    dice = (2 * intersection + SMOOTH) / size
    # Row by row, since a long float32 sum on CPU is sequential and loses digits.
    loss = (1 - dice).mean() - log_true.mean(3).mean(2).mean()
    slope = dice / size / dice.size  # through the size of the prediction
    gain = -2 / size / dice.size  # through the intersection
    return loss, (slope, gain, 1 / log_true.size)


def _gradient(logits, labels, log_total, slopes):
    """Gradient in the logits.

    The softmax turns g = d loss / d p into p * (g - sum_k p_k g_k).
    """
    slope, gain, of_voxel = slopes
    slope, log_total = _per_voxel(slope), log_total[..., None]
    p = jnp.exp(logits - log_total)
    p_true = jnp.exp(_at_label(logits, labels)[..., None] - log_total)
    pull = p_true * _gain_of_label(gain, labels)[..., None]  # [B, D, H, W, 1]
    mean_g = (p * slope).sum(-1, keepdims=True) + pull
    is_true = labels[..., None] == jnp.arange(logits.shape[-1])
    return p * (slope - mean_g + of_voxel) + is_true * (pull - of_voxel)


@jax.custom_vjp
def _loss_of_features(features, kernel, bias, labels):
    return _forward_of_features(features, kernel, bias, labels)[0]


def _forward_of_features(features, kernel, bias, labels):
    def block(start, count, found):
        by_voxel, by_class = found
        here, labels_here = _take((features, labels), start, count)
        log_total, log_true, *sums = _sums(_logits(here, kernel, bias), labels_here)
        by_voxel = _put(by_voxel, (log_total, log_true), start)
        return by_voxel, jax.tree.map(jnp.add, by_class, tuple(sums))

    # Sums stay apart by sample, so by device.
    zeros = jnp.zeros((features.shape[0], kernel.shape[-1]))
    empty = _empty(features, labels.shape).astype(jnp.float32)
    by_voxel, sums = _over_blocks(
        block, ((empty, empty), (zeros, zeros, zeros)), features, kernel
    )
    log_total, log_true = by_voxel
    loss, slopes = _loss_of_sums(log_true, *sums)
    return loss, (features, kernel, bias, labels, log_total, slopes)


def _backward_of_features(saved, cotangent):
    features, kernel, bias, labels, log_total, slopes = saved

    def block(start, count, found):
        dfeatures, dkernel, dbias = found
        here, *of_voxels = _take((features, labels, log_total), start, count)
        g = cotangent * _gradient(_logits(here, kernel, bias), *of_voxels, slopes)
        with jax.named_scope("head"):
            g = g.astype(features.dtype)
            (dfeatures,) = _put((dfeatures,), (g @ kernel.T,), start)
            dkernel += jnp.einsum(
                "bxyzc,bxyzo->bco", here, g, preferred_element_type=jnp.float32
            )
            return dfeatures, dkernel, dbias + g.sum(VOXELS, dtype=jnp.float32)

    samples = features.shape[0]
    found = (
        _empty(features, features.shape),
        jnp.zeros((samples, *kernel.shape)),
        jnp.zeros((samples, *bias.shape)),
    )
    dfeatures, dkernel, dbias = _over_blocks(block, found, features, kernel)
    dkernel, dbias = dkernel.sum(0), dbias.sum(0)
    return dfeatures, dkernel.astype(kernel.dtype), dbias.astype(bias.dtype), None


_loss_of_features.defvjp(_forward_of_features, _backward_of_features)


@jax.named_scope("head")
def _logits(features, kernel, bias):
    return (features @ kernel + bias).astype(jnp.float32)


def _over_blocks(block, found, features, kernel):
    """Carry `found` through `block(first plane, planes, found)`, over all planes."""
    _, depth, height, width, _ = features.shape
    most = max(1, BLOCK // (height * width * kernel.shape[-1]))
    count = max(n for n in range(1, depth + 1) if depth % n == 0 and n <= most)

    def body(index, found):
        return block(index * count, count, found)

    return lax.fori_loop(0, depth // count, body, found)


def _empty(features, shape):
    """Return an array to be overwritten.

    Made of `features`, since XLA makes constants at the start of the program, where
    they take memory until they are used.
    """
    one = features[:, :1, :1, :1, :1].reshape(-1, *(1,) * (len(shape) - 1))
    return jnp.broadcast_to(one, shape)


def _take(arrays, start, count):
    return [lax.dynamic_slice_in_dim(a, start, count, axis=1) for a in arrays]


def _put(arrays, parts, start):
    pairs = zip(arrays, parts, strict=True)
    return tuple(lax.dynamic_update_slice_in_dim(*p, start, axis=1) for p in pairs)


def _at_label(values, labels):
    """Entry of `values [..., K]` at each label; NaN where there is none."""
    return jnp.take_along_axis(values, labels[..., None], axis=-1)[..., 0]


def _gain_of_label(gain, labels):
    flat = labels.reshape(labels.shape[0], -1)
    return jnp.take_along_axis(gain, flat, axis=1).reshape(labels.shape)


def _per_voxel(by_class):
    return by_class[:, None, None, None, :]


def _sums_by_class(values, labels, num_classes):
    """Sums of `values [B, D, H, W]` and numbers of voxels by class, each `[B, K]`."""
    sums, count = jax.lax.platform_dependent(
        values,
        labels,
        cpu=partial(sums_by_scatter, num_classes=num_classes),
        default=partial(sums_by_comparison, num_classes=num_classes),
    )
    return sums, count.astype(jnp.float32)


def sums_by_comparison(values, labels, *, num_classes):
    """Sum by class on accelerators, which fuse the comparison into the reduction.

    A scatter would queue all voxels of one class at one address, and is slow on TPU.
    """
    here = labels[..., None] == jnp.arange(num_classes)
    sums = jnp.where(here, values[..., None], 0).sum(VOXELS)
    return sums, here.sum(VOXELS, dtype=jnp.int32)


def sums_by_scatter(values, labels, *, num_classes):
    """Sum by class on CPU, which would write the comparison out: benchmarks/loss.py.

    One bin per row and class keeps the float32 sums short; one per class alone would
    lose three digits where one class fills the patch.
    """
    bins = jnp.zeros((*labels.shape[:3], num_classes))
    b, d, h = jnp.indices(labels.shape[:3], sparse=True)
    where = (b[..., None], d[..., None], h[..., None], labels)
    count = bins.astype(jnp.int32).at[where].add(1)
    return bins.at[where].add(values).sum((1, 2)), count.sum((1, 2))
