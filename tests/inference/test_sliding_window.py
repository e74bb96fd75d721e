import tracemalloc

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from scipy import ndimage

from swinsmt_jax.checks import UserError
from swinsmt_jax.inference import windows as geometry
from swinsmt_jax.inference.sliding_window import predict_labels, sliding_window

WINDOW = (8, 6, 4)


def network(kernel):
    """Make the network of the goldens: tanh(convolution) * mean of the patch."""

    @jax.jit
    def predict(x):
        y = jax.lax.conv_general_dilated(
            x, kernel, (1, 1, 1), "SAME", dimension_numbers=("NDHWC", "OIDHW", "NDHWC")
        )
        return jnp.tanh(y) * x.mean((1, 2, 3), keepdims=True)

    return predict


@jax.jit
def local(x):
    """Three classes, each voxel by itself: windows cannot be seen in the result."""
    return jnp.concatenate([x, x**2, 1 - x], axis=-1)


@jax.jit
def contextual(x):
    """Two classes that depend on the whole window."""
    return jnp.concatenate([x, x.mean((1, 2, 3), keepdims=True) + 0 * x], axis=-1)


@jax.jit
def mixed(x):
    """Three classes of a voxel and of the window that sees it."""
    mean = x.mean((1, 2, 3), keepdims=True)
    return jnp.concatenate([x, 2 * x**2 + 10 * (mean - 0.5), 1 - x], axis=-1)


@pytest.mark.parametrize("blend", ["constant", "gaussian"])
@pytest.mark.parametrize("window_batch", [1, 4])
def test_equals_monai(shared, blend, window_batch):
    golden = np.load(shared / "parity/modules.npz")
    result = sliding_window(
        network(golden["sliding/kernel"]),
        np.moveaxis(golden["sliding/volume"][0], 0, -1),
        window=(32, 32, 32),
        num_classes=3,
        blend=blend,
        window_batch=window_batch,
    )
    expected = np.moveaxis(golden[f"sliding/{blend}"][0], 0, -1)
    np.testing.assert_allclose(result, expected, atol=1e-5)


@pytest.mark.parametrize("shape", [(8, 6, 4), (19, 6, 9), (5, 20, 3), (1, 1, 1)])
@pytest.mark.parametrize("overlap", [0.0, 0.5, 0.8])
def test_a_local_network_is_not_changed(rng, shape, overlap):
    volume = rng.random((*shape, 1), dtype=np.float32)
    result = sliding_window(
        local, volume, window=WINDOW, num_classes=3, overlap=overlap, window_batch=2
    )
    assert result.dtype == np.float32
    np.testing.assert_allclose(result, local(volume), atol=2e-6)


@pytest.mark.parametrize("shape", [(19, 11, 9), (5, 20, 3)])
def test_equals_a_naive_average(rng, shape):
    volume = rng.random((*shape, 1), dtype=np.float32)
    pad = geometry.padding(shape, WINDOW)
    padded = np.pad(volume, (*pad, (0, 0)))
    weight = geometry.importance(WINDOW, blend="gaussian")[..., None]
    total, weights = np.zeros((*padded.shape[:3], 2)), np.zeros((*padded.shape[:3], 1))
    for start in geometry.window_starts(padded.shape[:3], WINDOW, overlap=0.6):
        box = tuple(slice(s, s + w) for s, w in zip(start, WINDOW, strict=True))
        total[box] += weight * contextual(padded[box][None])[0]
        weights[box] += weight
    inner = tuple(slice(a, a + n) for (a, _), n in zip(pad, shape, strict=True))
    result = sliding_window(
        contextual, volume, window=WINDOW, num_classes=2, overlap=0.6, window_batch=3
    )
    np.testing.assert_allclose(result, (total / weights)[inner], rtol=1e-5)


@pytest.mark.parametrize("accumulate", ["host", "device"])
@pytest.mark.parametrize("shape", [(21, 11, 9), (9, 13, 27), (5, 20, 3), (1, 1, 1)])
def test_labels_are_the_argmax(rng, shape, accumulate):
    volume = rng.random((*shape, 1), dtype=np.float32)
    options = dict(window=WINDOW, num_classes=3, window_batch=2)
    labels = predict_labels(mixed, volume, **options, accumulate=accumulate)
    assert labels.dtype == np.uint8 and labels.shape == shape
    logits = sliding_window(mixed, volume, **options)
    np.testing.assert_array_equal(labels, logits.argmax(-1))


@pytest.mark.parametrize("accumulate", ["host", "device"])
@pytest.mark.parametrize("step", [0.4, 1.0, 2.3])
@pytest.mark.parametrize("shape", [(13, 11, 9), (6, 5, 14)])
def test_labels_on_another_grid_are_those_of_interpolated_probabilities(
    rng, step, shape, accumulate
):
    volume = rng.random((*shape, 1), dtype=np.float32)
    options = dict(window=WINDOW, num_classes=3, window_batch=2)
    positions = [step * np.arange(int(n / step)) + 0.3 - 0.5 for n in shape]
    labels = predict_labels(
        mixed, volume, **options, positions=positions, accumulate=accumulate
    )
    logits = sliding_window(mixed, volume, **options)
    probabilities = np.asarray(jax.nn.softmax(logits))
    points = np.meshgrid(*positions, indexing="ij")
    expected = [
        ndimage.map_coordinates(p, points, order=1, mode="nearest")
        for p in np.moveaxis(probabilities, -1, 0)
    ]
    np.testing.assert_array_equal(labels, np.argmax(expected, axis=0))


def test_every_call_has_the_same_shape_and_padding_is_air():
    shapes, least = [], []

    def predict(x):
        shapes.append(x.shape)
        least.append(float(x.min()))
        return local(x)

    volume = np.ones((9, 6, 3, 1), np.float32)  # 2 windows, one voxel of padding
    sliding_window(predict, volume, window=WINDOW, num_classes=3, window_batch=3)
    assert shapes == [(3, *WINDOW, 1)]
    assert least == [0.0]


@pytest.mark.parametrize("accumulate", ["host", "device"])
def test_windows_of_air_are_computed_once(rng, accumulate):
    calls = []

    def predict(x):
        calls.append(1)
        return mixed(x) + 0.3

    volume = np.zeros((30, 6, 8, 1), np.float32)
    volume[:10] = rng.random((10, 6, 8, 1), dtype=np.float32)
    options = dict(window=WINDOW, num_classes=3)
    labels = predict_labels(predict, volume, accumulate=accumulate, **options)
    windows = geometry.window_starts(volume.shape[:3], WINDOW, overlap=0.5)
    assert len(calls) == 1 + sum(z < 10 for z, *_ in windows)
    faint = np.maximum(volume, 1e-9)  # so that no window is empty
    logits = sliding_window(lambda x: mixed(x) + 0.3, faint, **options)
    np.testing.assert_array_equal(labels, logits.argmax(-1))


def test_the_batch_is_divided_over_the_devices(rng):
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    sharding = NamedSharding(mesh, PartitionSpec("data"))
    seen = []

    def predict(x):
        seen.append(x.sharding)
        return contextual(x)

    volume = rng.random((19, 11, 9, 1), dtype=np.float32)
    options = dict(window=WINDOW, num_classes=2)
    result = sliding_window(
        predict, volume, window_batch=8, sharding=sharding, **options
    )
    assert set(seen) == {sharding}
    expected = sliding_window(contextual, volume, **options)
    np.testing.assert_allclose(result, expected, rtol=1e-5)
    for accumulate in ("host", "device"):
        labels = predict_labels(
            *(predict, volume),
            **options,
            window_batch=8,
            sharding=sharding,
            accumulate=accumulate,
        )
        np.testing.assert_array_equal(labels, expected.argmax(-1))
    with pytest.raises(UserError, match="multiple of 8"):
        sliding_window(predict, volume, window_batch=4, sharding=sharding, **options)


@pytest.mark.parametrize(
    "shape, options, words",
    [
        ((9, 9, 9), {}, r"\[D, H, W, C\]"),
        ((9, 9, 9, 1), {"window_batch": 0}, "window_batch is 0"),
        ((9, 9, 9, 1), {"overlap": 1.0}, "overlap is 1.0"),
        ((9, 9, 9, 1), {"blend": "mean"}, "blend is 'mean'"),
        ((9, 9, 9, 1), {"num_classes": 4}, "num_classes is 4"),
    ],
)
def test_refuses(shape, options, words):
    options = {"window": WINDOW, "num_classes": 3, **options}
    with pytest.raises(UserError, match=words):
        sliding_window(local, np.zeros(shape, np.float32), **options)


def test_labels_of_more_than_256_classes_are_refused():
    volume = np.zeros((9, 9, 9, 1), np.float32)
    with pytest.raises(UserError, match="num_classes is 300"):
        predict_labels(local, volume, window=WINDOW, num_classes=300)


@pytest.mark.parametrize("resampled", [False, True])
@pytest.mark.parametrize("accum_dtype, share", [("float32", 1), ("float16", 0.6)])
def test_memory_does_not_grow_with_the_length_of_the_scan(
    resampled, accum_dtype, share
):
    """It is that of half a window's planes, and of a window's where it is resampled."""
    window, cross, classes = (16, 16, 16), (24, 40), 60

    def peak(length):
        volume = np.zeros((length, *cross, 1), np.float32)
        wide = jax.jit(lambda x: jnp.repeat(x, classes, axis=-1))
        options = dict(window=window, num_classes=classes, accum_dtype=accum_dtype)
        if resampled:
            options["positions"] = [np.arange(0, n - 1, 1.5) for n in volume.shape[:3]]
        predict_labels(wide, volume[:16], **options | {"positions": None})  # compiles
        tracemalloc.start()
        predict_labels(wide, volume, **options)
        size = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return size

    carried = 8 * np.prod(cross) * classes * 4
    short, long = peak(80), peak(400)
    assert long < 1.1 * short + 400 * np.prod(cross)  # the labels themselves
    assert short < share * (4.5 if resampled else 2) * carried


def test_memory_where_the_last_windows_of_an_axis_share_more_than_others():
    """Windows of 32 at 0, 16, 32 and 43: the last two share 21 planes, not 16."""
    side, classes = 75, 40
    wide = jax.jit(lambda x: jnp.repeat(x, classes, axis=-1))
    volume = np.zeros((side,) * 3 + (1,), np.float32)
    options = dict(window=(32, 32, 32), num_classes=classes)
    predict_labels(wide, volume[:32, :32, :32], **options)  # compiles
    tracemalloc.start()
    predict_labels(wide, volume, **options)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1.4 * 16 * side**2 * classes * 4


@jax.jit
def fails_on_bright(x):
    """Logits that are NaN where a window holds a voxel above 1."""
    bad = x.max((1, 2, 3), keepdims=True) > 1
    return jnp.where(bad, jnp.nan, local(x))


@pytest.mark.parametrize("window_batch, sharded", [(1, False), (3, False), (4, True)])
@pytest.mark.parametrize("accumulate", ["host", "device"])
def test_logits_that_are_not_finite_are_an_error(accumulate, window_batch, sharded):
    volume = np.full((9, 12, 20, 1), 0.5, np.float32)
    mesh = jax.make_mesh((4,), ("data",), axis_types=(AxisType.Auto,))
    options = {
        "window": WINDOW,
        "num_classes": 3,
        "overlap": 0.0,
        "accumulate": accumulate,
        "window_batch": window_batch,
        "sharding": NamedSharding(mesh, PartitionSpec("data")) if sharded else None,
    }
    predict_labels(fails_on_bright, volume, **options)
    volume[8, 11, 19] = 2  # windows along the longest axis, the last of 5 x 2 x 2
    words = r"NaN or infinite in window 20 of 20, which begins at voxel \(1, 6, 16\)"
    with pytest.raises(UserError, match=words):
        predict_labels(fails_on_bright, volume, **options)
