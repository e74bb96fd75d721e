"""Dice plus cross-entropy: what training minimises."""

from functools import partial

import jax
import jax.numpy as jnp

from swinsmt_jax import checks

SMOOTH = 1e-5  # added to numerator and denominator of Dice, as in MONAI
VOXELS = (1, 2, 3)


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
    checks.require(
        logits.ndim == 5 and labels.shape == logits.shape[:-1],
        f"labels have shape {labels.shape} and logits {logits.shape}, but logits must "
        "be [B, D, H, W, K] and labels [B, D, H, W] of the same voxels.",
    )
    checks.require(
        jnp.issubdtype(labels.dtype, jnp.integer),
        f"labels have dtype {labels.dtype}, but must be integer class ids.",
    )
    return _loss(logits.astype(jnp.float32), labels.astype(jnp.int32))


@jax.custom_vjp
def _loss(logits, labels):
    return _forward(logits, labels)[0]


def _forward(logits, labels):
    log_total = jax.nn.logsumexp(logits, axis=-1, keepdims=True)  # [B, D, H, W, 1]
    log_true = _at_label(logits, labels) - log_total[..., 0]  # [B, D, H, W]
    predicted = jnp.exp(logits - log_total).sum(VOXELS)  # [B, K]
    intersection, truth = _sums_by_class(jnp.exp(log_true), labels, logits.shape[-1])
    dice = (2 * intersection + SMOOTH) / (predicted + truth + SMOOTH)
    # Row by row, since a long float32 sum on CPU is sequential and loses digits.
    loss = (1 - dice).mean() - log_true.mean(3).mean(2).mean()
    return loss, (logits, labels, log_total, dice, predicted + truth + SMOOTH)


def _backward(saved, cotangent):
    """Gradient in the logits, from d loss / d probability of the two parts of Dice.

    With p the probabilities and y the label, d loss / d p_k = slope_k + [k = y] gain_y,
    and the softmax turns g = d loss / d p into p * (g - sum_k p_k g_k).
    """
    logits, labels, log_total, dice, size = saved
    voxels = labels.size
    slope = _per_voxel(dice / size / dice.size)  # through the size of the prediction
    gain = -2 / size / dice.size  # through the intersection, [B, K]
    p = jnp.exp(logits - log_total)
    p_true = jnp.exp(_at_label(logits, labels)[..., None] - log_total)
    pull = p_true * _gain_of_label(gain, labels)[..., None]  # [B, D, H, W, 1]
    mean_g = (p * slope).sum(-1, keepdims=True) + pull
    is_true = labels[..., None] == jnp.arange(logits.shape[-1])
    grad = p * (slope - mean_g + 1 / voxels) + is_true * (pull - 1 / voxels)
    return cotangent * grad, None


_loss.defvjp(_forward, _backward)


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
