"""What the experts of a trained network do, half-way through its training and after."""

from collections.abc import Mapping
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from swinsmt_jax.config import DataConfig
from swinsmt_jax.data import pipeline
from swinsmt_jax.data.network_view import network_view
from swinsmt_jax.data.sample import Sample
from swinsmt_jax.training.checkpoint import load_model
from swinsmt_jax.training.workdir import CHECKPOINTS


def expert_use(workdir: Path, *, split: str) -> dict[str, dict]:
    """Return {step: {block: measures}} of the checkpoints that a run keeps.

    The measures are means over the central crop of each case of the split:
    "importance" and "load" of each expert, see `ops.soft_routing.RoutingStatistics`;
    "dispatch_entropy" and "combine_entropy", from 0 to 1, where weights are equal.
    """
    steps = sorted(
        int(folder.name) for folder in (workdir / CHECKPOINTS).glob("[0-9]*")
    )
    found = {}
    for step in steps:
        config, model, _ = load_model(workdir, step=step)
        graphdef, params = nnx.split(model)

        @jax.jit
        def routing(params, x, graphdef=graphdef):
            return nnx.merge(graphdef, params)(x, return_routing="statistics")[1]

        cases = pipeline.find_cases(config.data, split=split)
        crops = [central_crop(config.data, case) for case in cases]
        by_case = [_measures(routing(params, crop[None])) for crop in crops]
        found[str(step)] = jax.tree.map(
            lambda *values: np.mean(values, axis=0).tolist(), *by_case
        )
    return found


def network_image(data: DataConfig, sample: Sample) -> np.ndarray:
    """Return a sample of `pipeline.load_foreground` as the network sees it."""
    return network_view(
        sample.image,
        sample.affine,
        spacing=0.0,
        hu_range=data.hu_range,
        normalization=data.normalization,
    ).image


def central_crop(data: DataConfig, case: pipeline.Case) -> np.ndarray:
    """Return the central crop of a case as the network sees it, [D, H, W, C]."""
    image = network_image(data, pipeline.load_foreground(data, case))
    for axis, side in enumerate(data.patch_shape):
        missing = max(0, side - image.shape[axis])
        before = [(0, 0)] * image.ndim
        before[axis] = (missing // 2, missing - missing // 2)
        image = np.pad(image, before)
        start = (image.shape[axis] - side) // 2
        image = image.take(range(start, start + side), axis=axis)
    return image


def _measures(routing: Mapping) -> dict[str, dict]:
    """Return the means over a batch, by block."""

    def of_block(found):
        tokens = found.combine_entropy.shape[1]
        slots = int(np.prod(found.dispatch_entropy.shape[1:]))
        return {
            "importance": found.importance().mean(0),
            "load": found.load().mean(0),
            "dispatch_entropy": found.dispatch_entropy.mean() / jnp.log(tokens),
            "combine_entropy": found.combine_entropy.mean() / jnp.log(slots),
        }

    return {block: of_block(found) for block, found in routing.items()}
