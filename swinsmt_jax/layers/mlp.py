"""The MLP of a transformer block."""

import jax
from flax import nnx

from swinsmt_jax.layers.linear import dropout, fold_in, gelu, linear


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
