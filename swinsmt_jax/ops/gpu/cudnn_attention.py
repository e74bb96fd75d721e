"""Softmax attention by cuDNN's fused kernel, where its limits allow.

It rounds queries and keys to bfloat16, which moves logits as large as Soft MoE's by
tenths: benchmarks/soft_moe.py measures what becomes of that. So it is a choice of its
own, and never made for the user.
"""

import re
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp


class Device(NamedTuple):
    """What decides whether cuDNN's kernel runs.

    Attributes:
        platform: "gpu" for NVIDIA's and AMD's.
        capability: NVIDIA's compute capability such as "9.0", or None.
    """

    platform: str
    capability: str | None = None


def this_device() -> Device:
    """Return the device on which jax computes."""
    capability = getattr(jax.local_devices()[0], "compute_capability", None)
    return Device(jax.default_backend(), capability)


def refusal(
    queries: jax.Array,
    keys: jax.Array,
    values: jax.Array,
    *,
    device: Device,
) -> str | None:
    """Return why cuDNN cannot take these [B, N, C] on a device, or None if it can."""
    channels = queries.shape[-1]
    if device.platform != "gpu":
        return f"the platform is {device.platform}, not gpu"
    most = _most_channels(device.capability)
    if not most:
        return (
            f"the compute capability is {device.capability}, and it needs 8.0 (Ampere)"
        )
    if values.dtype != jnp.bfloat16:
        return f"it computes in bfloat16 alone, and the values are {values.dtype}"
    if values.shape[-1] != channels:
        return f"values have {values.shape[-1]} channels and keys {channels}"
    if channels % 8 or channels > most:
        return f"{channels} channels are not a multiple of 8 up to {most}"
    return None


def _most_channels(capability):
    """Most channels of a head with gradients: 256 on Hopper, 0 without a kernel."""
    version = re.fullmatch(r"(\d+)\.\d+", capability or "")
    major = int(version[1]) if version else 0
    if major < 8:
        return 0
    return 256 if major == 9 else 128


def attend(
    queries: jax.Array,
    keys: jax.Array,
    values: jax.Array,
    *,
    implementation: Literal["cudnn", "xla"] = "cudnn",
) -> jax.Array:
    """Average values [B, K, C] with weights softmax over keys of (queries . keys).

    Args:
        queries: [B, Q, C].
        keys: [B, K, C].
        values: [B, K, C].
        implementation: of `jax.nn.dot_product_attention`; "xla" rounds alike on any
            platform, and holds the whole matrix.

    Returns:
        [B, Q, C] in the values' dtype.
    """
    q, k, v = (x.astype(jnp.bfloat16)[:, :, None] for x in (queries, keys, values))
    out = jax.nn.dot_product_attention(
        q, k, v, scale=1.0, implementation=implementation
    )
    return out[:, :, 0].astype(values.dtype)
