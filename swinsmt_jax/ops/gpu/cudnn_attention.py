"""Softmax attention by cuDNN's fused kernels, where their limits allow.

They round queries, keys and biases to bfloat16, as PyTorch's autocast does. Networks
that compute in float32 never get them. `by_platform` chooses.
"""

import re
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.custom_derivatives import linear_call

from swinsmt_jax.ops import windows

# "xla" rounds alike on any platform, and holds the whole matrix
Implementation = Literal["cudnn", "xla"]
MULTIPLE = 8  # of tokens, where there is a bias
PADDING = -1e4  # a logit that leaves nothing of a weight
CALLS = ("fmhaSoftmax", "fmhaScaleBiasSoftmax")
TARGETS = tuple(f"__cudnn${call}{end}" for call in CALLS for end in ("", "Backward"))


class Device(NamedTuple):
    """What decides whether cuDNN's kernel runs.

    Attributes:
        platform: "gpu" for NVIDIA's and AMD's.
        capability: NVIDIA's compute capability such as "9.0", or None.
    """

    platform: str
    capability: str | None = None

    @property
    def multiplies_bfloat16(self) -> bool:
        """Whether XLA makes float32 products there of bfloat16 ones."""
        return self.platform != "gpu" or _most_channels(self.capability) > 0


def this_device() -> Device:
    """Return the device on which jax computes."""
    capability = getattr(jax.local_devices()[0], "compute_capability", None)
    return Device(jax.default_backend(), capability)


def refusal(
    queries: jax.Array | jax.ShapeDtypeStruct,
    keys: jax.Array | jax.ShapeDtypeStruct,
    values: jax.Array | jax.ShapeDtypeStruct,
    *,
    device: Device,
) -> str | None:
    """Return why cuDNN cannot take these [..., C] on a device, or None if it can.

    It depends on their shapes and the values' dtype alone.
    """
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
    if not channels == keys.shape[-1] == values.shape[-1]:
        return f"values have {values.shape[-1]} channels and keys {keys.shape[-1]}"
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
    implementation: Implementation = "cudnn",
) -> jax.Array:
    """Average values [B, K, C] with weights softmax over keys of (queries . keys).

    Args:
        queries: [B, Q, C].
        keys: [B, K, C].
        values: [B, K, C].
        implementation: of `jax.nn.dot_product_attention`.

    Returns:
        [B, Q, C] in the values' dtype.
    """
    q, k, v = (x.astype(jnp.bfloat16)[:, :, None] for x in (queries, keys, values))
    out = jax.nn.dot_product_attention(
        q, k, v, scale=1.0, implementation=implementation
    )
    return out[:, :, 0].astype(values.dtype)


def attend_within_windows(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    bias: jax.Array | None = None,
    regions: np.ndarray | None = None,
    *,
    implementation: Implementation = "cudnn",
) -> jax.Array:
    """Attention of each window's tokens to one another.

    The windows of a shifted grid have 8 patterns of regions at most. Each pattern is
    one call, whose bias is that of the positions with the pattern's mask; cuDNN sums
    the gradient of such a bias over the windows itself. Tokens are padded to a multiple
    of 8, as it wants them.

    Args:
        q, k, v: [B, W, n, h, c]; the queries are scaled by 1 / sqrt(c).
        bias: [h, n, n], or None.
        regions: int [W, n], known when the program is traced; or None.
        implementation: of `jax.nn.dot_product_attention`.

    Returns:
        [B, W, n, h, c] in the values' dtype.
    """
    b, w, n, h, c = q.shape
    if bias is None and regions is None:
        flat = (x.reshape(b * w, n, h, c) for x in (q, k, v))
        y = jax.nn.dot_product_attention(*flat, implementation=implementation)
        return y.reshape(b, w, n, h, c)
    bias = jnp.zeros((h, n, n)) if bias is None else bias
    regions = np.zeros((w, n), np.int32) if regions is None else regions
    patterns, pattern = np.unique(regions, axis=0, return_inverse=True)
    order = np.argsort(pattern.reshape(-1), kind="stable")
    q, k, v = (_in_order(x, order) for x in (q, k, v))
    more = -n % MULTIPLE
    results, first = [], 0
    for own, count in zip(patterns, np.bincount(pattern.reshape(-1)), strict=True):
        here = slice(first, first + count)
        padding = ((0, 0), (0, more), (0, 0), (0, 0))
        queries, keys, values = (
            jnp.pad(x[:, here].reshape(-1, n, h, c), padding) for x in (q, k, v)
        )
        apart = np.where(own[:, None] != own, windows.DIFFERENT_REGION, 0.0)
        logits = jnp.pad(bias + apart.astype(np.float32), ((0, 0), (0, more), (0, 0)))
        columns = ((0, 0), (0, 0), (0, more))
        logits = jnp.pad(logits, columns, constant_values=PADDING)[None]
        y = jax.nn.dot_product_attention(
            queries,
            keys,
            values,
            bias=logits.astype(q.dtype),
            implementation=implementation,
        )
        results.append(y[:, :n].reshape(b, count, n, h, c))
        first += count
    return _in_order(jnp.concatenate(results, axis=1), np.argsort(order))


def _in_order(x, order):
    """Reorder the windows of [B, W, ...]; the gradient needs no scatter."""
    if np.array_equal(order, np.arange(len(order))):
        return x
    back = np.argsort(order)
    return linear_call(lambda _, x: x[:, order], lambda _, g: g[:, back], (), x)
