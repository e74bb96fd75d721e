"""From a network, and a scan as it sees it, to the labels of the scan."""

import dataclasses
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from flax import nnx

from swinsmt_jax import checks
from swinsmt_jax.class_map import ClassMap
from swinsmt_jax.config import InferenceConfig
from swinsmt_jax.data.network_view import NetworkView
from swinsmt_jax.inference.sliding_window import Predict, predict_labels
from swinsmt_jax.models import abstract_model, split
from swinsmt_jax.models.registry import NetworkConfig


@jax.jit
def _apply(model, windows):
    return model(windows)


@jax.jit
def _apply_mirrored(model, windows, exchanged):
    mirrored = jnp.flip(model(jnp.flip(windows, 1)), 1)
    return (model(windows) + mirrored[..., exchanged]) / 2


def predict_fn(model: Callable, *, exchanged: np.ndarray | None = None) -> Predict:
    """Return the jitted function from windows to logits of a model, a pytree.

    With `exchanged`, from `left_right_swap`, logits are the mean over a window and its
    mirror image.
    """
    if exchanged is None:
        return lambda windows: _apply(model, windows)
    return lambda windows: _apply_mirrored(model, windows, exchanged)


def computing_in(
    dtype: str | None, config: NetworkConfig, model: nnx.Module
) -> tuple[NetworkConfig, nnx.Module]:
    """Return config and network for matrix products and convolutions in another dtype.

    Parameters stay as they are. None changes nothing.

    Raises:
        UserError: for a dtype that networks do not have.
    """
    if dtype is None:
        return config, model
    config = dataclasses.replace(config, dtype=dtype)
    return config, nnx.merge(abstract_model(config)[0], split(model)[1])


def left_right_swap(names: Sequence[str], *, num_classes: int) -> np.ndarray:
    """Return the id of each class' counterpart on the other side of the body, `[K]`.

    Args:
        names: of the label ids, the background first.
        num_classes: K, of the network.

    Raises:
        UserError: for a network whose classes leave out counterparts.
    """
    exchanged = np.arange(num_classes)
    known = ClassMap(tuple(names)).left_right_swap()[:num_classes]
    exchanged[: len(known)] = known
    checks.require(
        bool(exchanged.max() < num_classes),
        f"the network gives {num_classes} classes, and some have their left or right "
        f"counterpart beyond: {np.flatnonzero(exchanged >= num_classes).tolist()}; "
        "predict without mirroring.",
    )
    return exchanged


def segment(
    predict: Predict,
    view: NetworkView,
    *,
    window: Sequence[int],
    num_classes: int,
    inference: InferenceConfig,
    sharding: jax.sharding.Sharding | None = None,
    sums: str = "float32",
    progress: Callable[[int, int], None] | None = None,
) -> np.ndarray:
    """Return the labels of a scan on its own grid, uint8 `[X, Y, Z]`.

    Where the network sees the scan resampled, its probabilities are brought back to the
    scan's grid, and there they become labels. Outside the foreground is background.

    Args:
        predict: a jitted function `[b, *window, C] -> [b, *window, K]`.
        view: the scan, from `network_view`.
        window: the training patch, since a Soft MoE's result depends on it.
        num_classes: K.
        inference: overlap, blending, batch and place of the sums.
        sharding: of the batches of windows, whose size is rounded up to fill it.
        sums, progress: as in `predict_labels`.
    """
    labels = np.zeros(view.shape, np.uint8)
    labels[view.box] = predict_labels(
        predict,
        view.image,
        window=window,
        num_classes=num_classes,
        overlap=inference.overlap,
        blend=inference.blend,
        window_batch=_filling(inference.window_batch, sharding),
        sharding=sharding,
        positions=view.positions,
        sums=sums,
        accumulate=inference.accumulate,
        progress=progress,
    )
    return labels


def batch_sharding() -> jax.sharding.Sharding | None:
    """Divide batches of windows over this process's devices; None if it is one."""
    devices = jax.local_devices()
    if len(devices) == 1:
        return None
    axis = (jax.sharding.AxisType.Auto,)
    mesh = jax.make_mesh((len(devices),), ("data",), axis_types=axis, devices=devices)
    return jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))


def _filling(wanted, sharding):
    """Round a batch of windows up, so that every device of the sharding works."""
    devices = 1 if sharding is None else sharding.num_devices
    batch = -(-wanted // devices) * devices
    if batch != wanted:
        logging.log_first_n(
            logging.INFO,
            "inference.window_batch is raised from %d to %d for %d devices.",
            1,
            wanted,
            batch,
            devices,
        )
    return batch
