"""Where in a scan each expert of a Soft MoE has its say."""

from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from swinsmt_jax import checks
from swinsmt_jax.config import InferenceConfig
from swinsmt_jax.inference.sliding_window import sliding_window
from swinsmt_jax.models.registry import NetworkConfig


def expert_shares(
    model: nnx.Module,
    config: NetworkConfig,
    volume: np.ndarray,
    *,
    block: str,
    window: Sequence[int],
    inference: InferenceConfig,
) -> np.ndarray:
    """Return which share of each voxel's combine weight goes to each expert.

    A token's combine weights are added up by expert and stand for all voxels of the
    token; where the sliding windows overlap they are averaged as logits would be.

    Args:
        model: Swin SMT.
        config: of the network.
        volume: [D, H, W, C], scaled as in training.
        block: one of the config's `moe_strides`, such as "stage2/block0".
        window: the training patch.
        inference: overlap, blending and batch of the windows.

    Returns:
        float32 [D, H, W, E]; sums to one over the experts.

    Raises:
        UserError: for a network without experts, and an unknown block.
    """
    checks.require(
        config.num_experts > 0,
        "the network has no experts, so there is no routing to show; take a Swin SMT.",
    )
    checks.one_of("block", block, config.moe_strides)
    stride = config.moe_strides[block]
    grid = [side // stride for side in window]
    graphdef, params = nnx.split(model)

    @jax.jit
    def shares(params, x):
        _, routing = nnx.merge(graphdef, params)(x, return_routing="statistics")
        share = routing[block].expert_share.reshape(x.shape[0], *grid, -1)
        for axis in (1, 2, 3):
            share = jnp.repeat(share, stride, axis=axis)
        return share

    return sliding_window(
        lambda x: shares(params, x),
        volume,
        window=window,
        num_classes=config.num_experts,
        overlap=inference.overlap,
        blend=inference.blend,
        window_batch=inference.window_batch,
    )


def shares_by_group(
    shares: np.ndarray, labels: np.ndarray, *, groups: Mapping[str, Sequence[int]]
) -> dict[str, np.ndarray]:
    """Average each expert's share over the voxels of each group of classes.

    Args:
        shares: [D, H, W, E].
        labels: [D, H, W], class ids.
        groups: {name: class ids}.

    Returns:
        {name: [E]} for the background and each group; NaN where it has no voxel.
    """
    found = {}
    for name, ids in {"background": (0,), **groups}.items():
        here = np.isin(labels, list(ids))
        empty = np.full(shares.shape[-1], np.nan, np.float32)
        found[name] = shares[here].mean(0) if here.any() else empty
    return found
