"""Losses of cases that annotate some of their classes, or not all of their voxels."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from swinsmt_jax.checks import UserError
from swinsmt_jax.labels import IGNORED
from swinsmt_jax.ops import by_platform
from swinsmt_jax.training import losses

CLASSES = 5
ANNOTATED = np.array(
    [[0, 1, 1, 1, 1], [1, 0, 1, 0, 1], [1, 0, 0, 0, 0], [0, 1, 0, 0, 1]], bool
)


@pytest.fixture
def sample(rng):
    """Logits and labels; of the first two samples some voxels are ignored."""
    logits = jnp.asarray(3 * rng.normal(size=(4, 3, 4, 5, CLASSES)), jnp.float32)
    labels = rng.integers(0, CLASSES, (4, 3, 4, 5)).astype(np.uint8)
    for found, known in zip(labels, ANNOTATED, strict=True):
        found[~known[found]] = 0
    labels[:2, 1, :2] = IGNORED
    return logits, labels


def naive(loss, logits, labels):
    """Pair by pair and voxel by voxel, each sample by itself."""
    costs, pairs = [], []
    for z, y, known in zip(logits, labels, ANNOTATED, strict=True):
        z, y = z[y != IGNORED], y[y != IGNORED]
        own = [k for k in range(1, CLASSES) if known[k]]
        if loss.one_vs_all:
            p = jax.nn.sigmoid(z[:, own] - z[:, :1])
            truth = jnp.stack([y == k for k in own], 1) if own else jnp.zeros(p.shape)
            right = jnp.log(jnp.where(truth, p, 1 - p)).sum(1) / max(1, len(own))
        else:
            others = [k for k in range(CLASSES) if k not in own]
            q = jax.nn.softmax(z)
            p = jnp.stack([q[:, others].sum(1), *(q[:, k] for k in own)], 1)
            truth = jnp.stack([y == k for k in (0, *own)], 1)
            right = jnp.log((p * truth).sum(1))
        costs.append(-right)
        for k in range(p.shape[1]):
            sums = p[:, k].sum(), (p[:, k] * truth[:, k]).sum(), truth[:, k].sum()
            pairs.append(loss.overlap(*(jnp.float32([[s]]) for s in sums)))
    return jnp.stack(pairs).mean() + jnp.concatenate(costs).mean()


def graded(loss):
    """Value and gradient by the logits, compiled."""
    return jax.jit(jax.value_and_grad(loss))


def assert_close(found, expected):
    np.testing.assert_allclose(found, expected, atol=3e-6 * np.abs(expected).max())


@pytest.mark.parametrize("name", losses.LOSSES)
def test_it_equals_a_naive_sum_over_what_is_annotated(sample, monkeypatch, name):
    """Value and gradient, of logits and of features in blocks of planes."""
    monkeypatch.setattr(by_platform, "ENTRIES_ON_CPU", 4 * 5 * CLASSES)
    loss, (logits, labels) = losses.make(name), sample
    found = graded(loss)(logits, labels, ANNOTATED)
    expected = graded(lambda z: naive(loss, z, labels))(logits)
    jax.tree.map(assert_close, found, expected)
    kernel, bias = np.eye(CLASSES, dtype=np.float32), np.zeros(CLASSES, np.float32)
    gradient = jax.jit(jax.grad(loss.of_features, argnums=(0, 2)))
    found = gradient(logits, kernel, bias, labels, ANNOTATED)
    assert_close(found[0], expected[1])
    assert_close(found[1], expected[1].sum((0, 1, 2, 3)))


@pytest.mark.parametrize("name", losses.LOSSES)
def test_all_annotated_is_the_plain_loss(sample, name):
    loss, (logits, labels) = losses.make(name), sample
    labels[labels == IGNORED] = 0
    everything = np.ones_like(ANNOTATED)
    found = graded(loss)(logits, labels, everything)
    jax.tree.map(assert_close, found, graded(loss)(logits, labels))


@pytest.mark.parametrize("name", losses.LOSSES)
def test_what_is_not_annotated_has_no_gradient(sample, name):
    loss, (logits, labels) = losses.make(name), sample
    gradient = graded(loss)
    _, grad = gradient(logits, labels, ANNOTATED)
    assert not np.any(grad[labels == IGNORED])  # for no class
    assert not np.any(grad[2])  # nothing annotated but the background
    assert np.any(grad[3])
    if loss.one_vs_all:
        by_class = np.abs(grad).sum((1, 2, 3))[:, 1:]
        assert not np.any(by_class[~ANNOTATED[:, 1:]])
    nothing = np.zeros_like(ANNOTATED)
    ignored = np.full_like(labels, IGNORED)
    for given in ((labels, nothing), (ignored, ANNOTATED)):
        value, grad = gradient(logits, *given)
        assert np.isfinite(value) and not np.any(grad)


@pytest.mark.parametrize("name", losses.LOSSES)
def test_a_class_that_is_not_annotated_costs_nothing_where_it_is_predicted(name):
    """Its voxels are labelled background, which must not be preferred to it there."""
    loss, labels = losses.make(name), np.zeros((1, 2, 2, 2), np.uint8)
    labels[0, 0, 0, 0] = 1
    known = np.array([[True, True, False]])

    def of(background):  # logits of each voxel that is labelled so
        logits = np.zeros((1, 2, 2, 2, 3), np.float32)
        logits[..., :] = background
        logits[0, 0, 0, 0] = (-9, 9, -9)
        return logits

    right, other, wrong = of((9, -9, -9)), of((-9, -18, 9)), of((-9, 9, -9))
    gradient = graded(loss)
    values = [float(gradient(z, labels, known)[0]) for z in (right, other, wrong)]
    if not loss.one_vs_all:
        np.testing.assert_allclose(values[1], values[0], atol=1e-5)
    assert values[1] < values[2]
    elsewhere = np.asarray(gradient(other, labels, known)[1])[labels == 0]
    assert np.abs(elsewhere).max() < 1e-4  # neither to background nor away from it
    plain = np.asarray(graded(loss)(other, labels)[1])
    assert np.abs(plain[labels == 0]).max() > 1e-2


def test_labels_out_of_range_are_no_ignored_ones(sample):
    loss, (logits, labels) = jax.jit(losses.make("dice_ce")), sample
    assert np.isnan(loss(logits, labels))  # 255 without `annotated`
    labels[0, 0, 0, 0] = CLASSES
    assert np.isnan(loss(logits, labels, ANNOTATED))
    with pytest.raises(UserError, match=r"annotated has shape \(4, 4\), but must be"):
        loss(logits, labels, ANNOTATED[:, 1:])


def test_a_label_of_a_class_that_is_not_annotated_is_background(sample):
    loss, (logits, labels) = jax.jit(losses.make("dice_ce")), sample
    cleared = labels.copy()
    labels[3, 0], cleared[3, 0] = 2, 0
    found, expected = (loss(logits, y, ANNOTATED) for y in (labels, cleared))
    assert found == expected
