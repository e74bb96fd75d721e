import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from swinsmt_jax.checks import UserError
from swinsmt_jax.ops import by_platform
from swinsmt_jax.training import losses
from swinsmt_jax.training.losses import sums_by_comparison, sums_by_scatter

dice_cross_entropy = losses.make("dice_ce")
dice_cross_entropy_of_features = dice_cross_entropy.of_features
value_and_grad = jax.jit(jax.value_and_grad(dice_cross_entropy))


def naive(logits, labels):
    """Soft Dice + cross-entropy in float64 numpy, with a one-hot."""
    logits = np.asarray(logits, np.float64)
    p = np.exp(logits - logits.max(-1, keepdims=True))
    p /= p.sum(-1, keepdims=True)
    truth = np.eye(logits.shape[-1])[labels]
    axes = (1, 2, 3)
    both = 2 * (p * truth).sum(axes) + 1e-5
    dice = both / (p.sum(axes) + truth.sum(axes) + 1e-5)
    return (1 - dice).mean() - (np.log(p) * truth).sum(-1).mean()


def sample(rng, shape=(2, 4, 5, 6), classes=7, absent=1):
    logits = rng.normal(size=(*shape, classes)).astype(np.float32) * 3
    return logits, rng.integers(0, classes - absent, shape)


def test_equals_monai(shared):
    golden = np.load(shared / "parity/modules.npz")
    logits = np.moveaxis(golden["dice_ce/logits"], 1, -1)
    value, grad = value_and_grad(logits, golden["dice_ce/y"][:, 0])
    assert value.dtype == jnp.float32
    np.testing.assert_allclose(value, golden["dice_ce/value"], rtol=1e-6)
    expected = np.moveaxis(golden["dice_ce/grad"], 1, -1)
    assert np.abs(grad - expected).max() < 1e-6 * np.abs(expected).max()


@pytest.mark.parametrize("dtype", [np.uint8, np.int32])
def test_equals_a_naive_sum(rng, dtype):
    logits, labels = sample(rng)
    value, _ = value_and_grad(logits, labels.astype(dtype))
    np.testing.assert_allclose(value, naive(logits, labels), rtol=1e-6)


def test_long_sums_keep_their_digits(rng):
    logits = rng.random((1, 64, 64, 64, 2)).astype(np.float32)
    labels = np.zeros((1, 64, 64, 64), np.uint8)  # every voxel in one bin
    value = jax.jit(dice_cross_entropy)(logits, labels)
    np.testing.assert_allclose(value, naive(logits, labels), rtol=5e-7)


def test_gradient_equals_finite_differences(rng):
    logits, labels = sample(rng, shape=(1, 2, 2, 2), classes=3)
    _, grad = value_and_grad(logits, labels)
    for index in np.ndindex(grad.shape):
        step = np.zeros(grad.shape)
        step[index] = 1e-5
        slope = naive(logits + step, labels) - naive(logits - step, labels)
        np.testing.assert_allclose(grad[index], slope / 2e-5, atol=2e-6)


def test_gradient_sums_to_zero_over_classes(rng):
    logits, labels = sample(rng)
    _, grad = value_and_grad(logits, labels)
    np.testing.assert_allclose(grad.sum(-1), 0, atol=1e-7)


def test_the_gradient_is_scaled_by_the_cotangent(rng):
    logits, labels = sample(rng)
    _, grad = value_and_grad(logits, labels)
    doubled = jax.jit(jax.grad(lambda x, y: 2 * dice_cross_entropy(x, y)))
    np.testing.assert_allclose(doubled(logits, labels), 2 * grad, atol=1e-8)


def test_extreme_logits_stay_finite(rng):
    logits, labels = sample(rng)
    value, grad = value_and_grad(logits * 1e4, labels)
    assert np.isfinite(value) and np.isfinite(grad).all()


def test_bfloat16_logits_give_a_float32_loss(rng):
    logits, labels = sample(rng)
    rounded = jnp.asarray(logits, jnp.bfloat16)
    value, grad = value_and_grad(rounded, labels)
    assert value.dtype == jnp.float32 and grad.dtype == jnp.bfloat16
    expected = naive(np.asarray(rounded, np.float32), labels)
    np.testing.assert_allclose(value, expected, rtol=1e-6)


def test_both_forms_of_the_sum_by_class_agree(rng):
    values = rng.random((2, 4, 5, 6), dtype=np.float32)
    labels = rng.integers(0, 6, values.shape)
    sums, count = sums_by_scatter(values, labels, num_classes=7)
    other_sums, other_count = sums_by_comparison(values, labels, num_classes=7)
    np.testing.assert_allclose(sums, other_sums, rtol=1e-6)
    np.testing.assert_array_equal(count, other_count)
    np.testing.assert_array_equal(count[1], np.bincount(labels[1].flat, minlength=7))


@pytest.mark.parametrize("label", [-1, 7])
@pytest.mark.parametrize("form", [sums_by_scatter, sums_by_comparison])
def test_a_label_out_of_range_shows_as_nan_on_cpu_and_gpu(
    rng, monkeypatch, form, label
):
    monkeypatch.setattr(losses, "sums_by_scatter", form)
    features, kernel, bias, labels = sample_of_features(rng)
    found = []
    for placed in (labels[0, 0, 0, 0], label):
        labels[0, 0, 0, 0] = placed
        found.append(dice_cross_entropy(features @ kernel + bias, labels))
        found.append(dice_cross_entropy_of_features(features, kernel, bias, labels))
    assert np.isnan(found).tolist() == [False, False, True, True]


def test_an_overlap_loss_of_ones_own_has_its_gradient(rng, monkeypatch):
    """In blocks of planes, and as jax derives it from a one-hot."""
    monkeypatch.setattr(by_platform, "ENTRIES_ON_CPU", 1)

    def jaccard(predicted, intersection, truth):
        return (1 - intersection / (predicted + truth - intersection + 1e-5)).mean()

    def plain(features, kernel, bias, labels):
        logits = features @ kernel + bias
        p, is_true = jax.nn.softmax(logits), jax.nn.one_hot(labels, logits.shape[-1])
        sums = (a.sum((1, 2, 3)) for a in (p, p * is_true, is_true))
        cross_entropy = -(jax.nn.log_softmax(logits) * is_true).sum(-1).mean()
        return jaccard(*sums) + cross_entropy

    arguments = sample_of_features(rng)
    value, found = gradients_of(losses.Loss(jaccard).of_features)(*arguments)
    expected, gradients = gradients_of(plain)(*arguments)
    np.testing.assert_allclose(value, expected, rtol=1e-6)
    for ours, theirs in zip(found, gradients, strict=True):
        scale = np.abs(theirs).max()
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=2e-6 * scale)


def test_tversky_punishes_missed_voxels_more_than_wrong_ones(rng):
    labels = np.zeros((1, 4, 4, 4), np.int32)
    labels[:, :2] = 1
    small, large = labels.copy(), labels.copy()
    small[:, 1], large[:, 2] = 0, 1
    sums = [
        [np.float32([[(p == 1).sum(), ((p == 1) & (labels == 1)).sum(), 32]])]
        for p in (small, large)
    ]
    missing, wrong = (
        float(losses.tversky(*(s[:, i] for i in range(3)))) for (s,) in sums
    )
    assert 0 < wrong < missing < 1


def plain_one_vs_all(features, kernel, bias, labels):
    logits = features @ kernel + bias
    z, axes = logits[..., 1:] - logits[..., :1], (1, 2, 3)
    truth = jax.nn.one_hot(labels, logits.shape[-1])[..., 1:]
    p = jax.nn.sigmoid(z)
    dice = 2 * (p * truth).sum(axes) / (p.sum(axes) + truth.sum(axes) + 1)
    return (1 - dice).mean() + optax.sigmoid_binary_cross_entropy(z, truth).mean()


@pytest.mark.parametrize("planes", [1, 6])
def test_one_vs_all_equals_what_jax_derives(rng, monkeypatch, planes):
    monkeypatch.setattr(by_platform, "ENTRIES_ON_CPU", planes * 5 * 4 * 7)
    loss, arguments = losses.make("one_vs_all"), sample_of_features(rng)
    value, found = gradients_of(loss.of_features)(*arguments)
    expected, gradients = gradients_of(plain_one_vs_all)(*arguments)
    np.testing.assert_allclose(value, expected, rtol=1e-6)
    for ours, theirs in zip(found, gradients, strict=True):
        scale = np.abs(theirs).max()
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=2e-6 * scale)
    features, kernel, bias, labels = arguments
    logits = features @ kernel + bias
    np.testing.assert_allclose(loss(logits, labels), expected, rtol=1e-6)
    assert np.isfinite(jax.grad(loss)(logits * 1e4, labels)).all()
    labels[0, 0, 0, 0] = 7
    assert np.isnan(loss(logits, labels))


def test_an_unknown_loss_is_refused():
    with pytest.raises(UserError, match="training.loss is 'dice_c'.*'dice_ce'?"):
        losses.make("dice_c")


@pytest.mark.parametrize("shape", [(2, 4, 5), (2, 4, 5, 7), (2, 4, 5, 6, 1)])
def test_refuses_labels_of_other_voxels(rng, shape):
    logits, _ = sample(rng)
    with pytest.raises(UserError, match=r"same voxels"):
        dice_cross_entropy(logits, np.zeros(shape, np.uint8))


def test_refuses_labels_that_are_not_integers(rng):
    logits, labels = sample(rng)
    with pytest.raises(UserError, match="float32"):
        dice_cross_entropy(logits, labels.astype(np.float32))


def test_sharded_batch_gives_the_same_and_gathers_nothing(rng):
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    by_sample = NamedSharding(mesh, PartitionSpec("data"))
    logits, labels = sample(rng, shape=(8, 3, 4, 5))
    value, grad = value_and_grad(logits, labels)
    sharded = jax.device_put((logits, labels), by_sample)
    text = value_and_grad.lower(*sharded).compile().as_text()
    assert "all-gather" not in text and "all-to-all" not in text
    sharded_value, sharded_grad = value_and_grad(*sharded)
    np.testing.assert_allclose(sharded_value, value, rtol=1e-6)
    np.testing.assert_allclose(sharded_grad, grad, rtol=1e-5, atol=1e-9)


def test_lowers_for_accelerators():
    logits = jax.ShapeDtypeStruct((2, 32, 32, 32, 118), jnp.float32)
    labels = jax.ShapeDtypeStruct((2, 32, 32, 32), jnp.uint8)
    export = jax.export.export(value_and_grad, platforms=("cuda", "tpu", "cpu"))
    exported = export(logits, labels)
    assert exported.out_avals[0].shape == ()


def test_memory_is_one_array_of_probabilities():
    shape = (1, 24, 24, 24, 118)
    logits = jax.ShapeDtypeStruct(shape, jnp.float32)
    labels = jax.ShapeDtypeStruct(shape[:-1], jnp.uint8)
    forward = jax.jit(dice_cross_entropy).lower(logits, labels).compile()
    both = value_and_grad.lower(logits, labels).compile()
    size = 4 * np.prod(shape)
    assert forward.memory_analysis().temp_size_in_bytes < 0.2 * size
    assert both.memory_analysis().temp_size_in_bytes < 1.2 * size


def of_logits(features, kernel, bias, labels):
    kernel, bias = (a.astype(features.dtype) for a in (kernel, bias))
    logits = features @ kernel + bias.astype(jnp.float32)
    return dice_cross_entropy(logits.astype(features.dtype), labels)


def gradients_of(loss):
    return jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2)))


def sample_of_features(rng, shape=(2, 6, 5, 4), channels=3, classes=7):
    features = rng.normal(size=(*shape, channels)).astype(np.float32)
    kernel = rng.normal(size=(channels, classes)).astype(np.float32)
    bias = rng.normal(size=classes).astype(np.float32)
    return features, kernel, bias, rng.integers(0, classes - 1, shape)


@pytest.mark.parametrize("planes", [1, 2, 4, 6])  # of 4, blocks have 3
def test_the_loss_of_features_equals_that_of_logits(rng, monkeypatch, planes):
    monkeypatch.setattr(by_platform, "ENTRIES_ON_CPU", planes * 5 * 4 * 7)
    arguments = sample_of_features(rng)
    value, found = gradients_of(dice_cross_entropy_of_features)(*arguments)
    expected, gradients = gradients_of(of_logits)(*arguments)
    np.testing.assert_allclose(value, expected, rtol=1e-6)
    for ours, theirs in zip(found, gradients, strict=True):
        scale = np.abs(theirs).max()
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=2e-6 * scale)


def test_the_loss_of_bfloat16_features_is_near_float32(rng, monkeypatch):
    """In bfloat16, jax 0.12 sums the kernel gradient of logits 3 % off on a CPU."""
    monkeypatch.setattr(by_platform, "ENTRIES_ON_CPU", 2 * 5 * 4 * 7)
    features, *others = sample_of_features(rng)
    features = jnp.asarray(features, jnp.bfloat16)
    value, found = gradients_of(dice_cross_entropy_of_features)(features, *others)
    exact = features.astype(jnp.float32)
    expected, gradients = gradients_of(of_logits)(exact, *others)
    np.testing.assert_allclose(value, expected, rtol=1e-3)
    assert found[0].dtype == jnp.bfloat16
    for ours, theirs in zip(found, gradients, strict=True):
        ours, theirs = (np.asarray(a, np.float32) for a in (ours, theirs))
        scale = np.abs(theirs).max()
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=0.01 * scale)


def test_the_loss_of_features_makes_no_logits(monkeypatch):
    shape, channels, classes = (1, 16, 24, 24), 4, 118
    monkeypatch.setattr(by_platform, "ENTRIES_ON_CPU", 24 * 24 * classes)
    types = {"features": (*shape, channels), "kernel": (channels, classes)}
    types = [
        jax.ShapeDtypeStruct(s, jnp.float32) for s in (*types.values(), (classes,))
    ]
    labels = jax.ShapeDtypeStruct(shape, jnp.uint8)
    compiled = gradients_of(dice_cross_entropy_of_features).lower(*types, labels)
    logits = 4 * np.prod(shape) * classes
    temporaries = compiled.compile().memory_analysis().temp_size_in_bytes
    assert temporaries < 0.5 * logits


def test_the_loss_of_sharded_features_gathers_nothing(rng):
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    by_sample = NamedSharding(mesh, PartitionSpec("data"))
    whole = NamedSharding(mesh, PartitionSpec())
    arguments = sample_of_features(rng, shape=(8, 3, 4, 5))
    placed = jax.device_put(arguments, (by_sample, whole, whole, by_sample))
    run = gradients_of(dice_cross_entropy_of_features)
    text = run.lower(*placed).compile().as_text()
    assert "all-gather" not in text and "all-to-all" not in text
    value, found = run(*placed)
    expected, gradients = run(*arguments)
    np.testing.assert_allclose(value, expected, rtol=1e-6)
    for ours, theirs in zip(found, gradients, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-7)


def test_the_loss_of_features_refuses_labels_of_other_voxels(rng):
    features, kernel, bias, labels = sample_of_features(rng)
    with pytest.raises(UserError, match=r"features \(2, 6, 5, 4, 3\).*same voxels"):
        dice_cross_entropy_of_features(features, kernel, bias, labels[:, 1:])


@pytest.mark.parametrize(
    "loss", [losses.Loss(lambda p, i, t: 1 - i / (p + t)), losses.soft_dice]
)
def test_a_loss_that_is_not_one_number_is_refused(monkeypatch, loss):
    monkeypatch.setitem(losses.LOSSES, "own", loss)
    with pytest.raises(UserError, match="must be Loss.function. of a function that"):
        losses.make("own")
