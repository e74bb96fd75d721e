"""Linear layer, norms, random dropping and MLP: the small parts of the transformer."""

import math

import jax
import jax.numpy as jnp
from flax import nnx

from swinsmt_jax.layers import initializers
from swinsmt_jax.ops.normalization import standardize


def linear(
    channels: int,
    features: int,
    *,
    use_bias: bool = True,
    stddev: float | None = None,
    dtype: str = "float32",
    rngs: nnx.Rngs,
) -> nnx.Linear:
    """Make an affine map of the last axis, [..., C] -> [..., O], in `dtype`.

    Its weights start from N(0, stddev^2) and its bias from 0, or both as in PyTorch.
    """
    draw = initial_bias = initializers.uniform(channels)
    if stddev is not None:
        draw, initial_bias = initializers.gaussian(stddev), initializers.filled(0.0)
    return nnx.Linear(
        channels,
        features,
        use_bias=use_bias,
        dtype=dtype,
        kernel_init=draw,
        bias_init=initial_bias,
        rngs=rngs,
    )


class LayerNorm(nnx.Module):
    """Layer norm of the last axis with scale and bias; statistics in float32.

    In place of `nnx.LayerNorm`, which keeps three float32 arrays as large as the input
    for the backward pass: this one keeps the input and one.
    """

    def __init__(self, channels: int, *, epsilon: float = 1e-5, dtype: str = "float32"):
        self.epsilon = epsilon
        self.dtype = dtype
        self.scale = initializers.constant(1.0, (channels,))
        self.bias = initializers.constant(0.0, (channels,))

    def __call__(self, x: jax.Array) -> jax.Array:
        """Return the normalised, scaled and moved `x` in the layer's dtype."""
        y = standardize(x, (x.ndim - 1,), epsilon=self.epsilon)
        return (y * self.scale[...] + self.bias[...]).astype(self.dtype)


@jax.custom_jvp
def gelu(x: jax.Array) -> jax.Array:
    """Exact GELU, written as PyTorch does, so that the two round alike.

    Its derivative is written out because that of `erf` raises inside `jax.shard_map`
    in jax 0.12.
    """
    return 0.5 * x * (1 + jax.lax.erf(x * 0.5**0.5))


@gelu.defjvp
def _gelu_jvp(primals, tangents):
    (x,), (dx,) = primals, tangents
    cumulative = 0.5 * (1 + jax.lax.erf(x * 0.5**0.5))
    density = jnp.exp(-0.5 * x * x) * (2 * math.pi) ** -0.5
    return x * cumulative, (cumulative + x * density) * dx


def dropout(x: jax.Array, *, rate: float, key: jax.Array | None) -> jax.Array:
    """Zero entries with probability `rate` and enlarge the rest; no key, no dropout."""
    return x if key is None else nnx.Dropout(rate)(x, rngs=key)


def drop_path(x: jax.Array, *, rate: float, key: jax.Array | None) -> jax.Array:
    """Zero whole samples of [B, ...] (stochastic depth, Huang et al. 2016)."""
    if key is None:
        return x
    return nnx.Dropout(rate, broadcast_dims=range(1, x.ndim))(x, rngs=key)


def fold_in(key: jax.Array | None, number: int) -> jax.Array | None:
    """Derive the key of a part; None stays None."""
    return None if key is None else jax.random.fold_in(key, number)


class MLP(nnx.Module):
    """Linear, exact GELU, linear on [..., C], with dropout after both."""

    def __init__(
        self,
        channels: int,
        *,
        hidden: int,
        dropout_rate: float = 0.0,
        stddev: float | None = None,
        dtype: str = "float32",
        rngs: nnx.Rngs,
    ):
        common: dict = {"stddev": stddev, "dtype": dtype, "rngs": rngs}
        self.dropout_rate = dropout_rate
        self.linear1 = linear(channels, hidden, **common)
        self.linear2 = linear(hidden, channels, **common)

    def __call__(self, x: jax.Array, *, key: jax.Array | None = None) -> jax.Array:
        """Map [..., C] to [..., C]."""
        x = gelu(self.linear1(x))
        x = dropout(x, rate=self.dropout_rate, key=fold_in(key, 0))
        x = self.linear2(x)
        return dropout(x, rate=self.dropout_rate, key=fold_in(key, 1))
