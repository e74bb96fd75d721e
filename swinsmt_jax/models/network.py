"""What every network is, and how one is made from its config."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx

from swinsmt_jax import checks
from swinsmt_jax.layers import initializers
from swinsmt_jax.models.registry import NetworkConfig, entry_of


class Network(nnx.Module):
    """A map from volumes to logits that holds a config and nothing but `nnx.Param`.

    A network whose last layer is a 1 x 1 x 1 convolution with bias calls that `out` and
    has a method `features(x, rngs=None)`, from the input to what `out` is applied to,
    [B, D, H, W, F]: it is then trained without making logits. Others override
    `__call__`.

    Args:
        config: a `NetworkConfig`.
    """

    out: Callable[[jax.Array], jax.Array]
    features: Callable[..., jax.Array]

    def __init__(self, config: NetworkConfig):
        self.config = config

    @property
    def total_stride(self) -> int | tuple[int, ...]:
        """Number of which every side of the input must be a multiple."""
        return self.config.total_stride

    @property
    def head(self) -> Callable[[jax.Array], jax.Array]:
        """The last layer, from features to logits."""
        return self.out

    def __call__(self, x: jax.Array, *, rngs: nnx.Rngs | None = None) -> jax.Array:
        """Segment a batch of volumes.

        Args:
            x: [B, D, H, W, C_in].
            rngs: switches dropout and drop path on; without it the result is
                deterministic.

        Returns:
            float32 logits [B, D, H, W, K].

        Raises:
            UserError: for a wrong rank, number of channels or shape.
        """
        y = self.features(x, rngs=rngs)
        with jax.named_scope("head"):
            return self.head(y).astype(jnp.float32)

    def check_input(self, x: jax.Array) -> None:
        """Raise `UserError` unless `x` is a batch that the config allows."""
        checks.image_batch(x.shape, channels=self.config.in_channels)
        self.config.check_patch("image patch", x.shape[1:4])


def create(config: NetworkConfig, *, rngs: nnx.Rngs) -> Network:
    """Build the network of a config with freshly initialised float32 parameters."""
    return entry_of(config).network(config, rngs=rngs)


def dropout_key(rngs: nnx.Rngs | None) -> jax.Array | None:
    """Return a new key for what is random in a forward pass; None for nothing."""
    return None if rngs is None else rngs.dropout()


def count_parameters(config: NetworkConfig) -> int:
    """Count the parameters of a config's network without making them."""
    return sum(leaf.size for leaf in jax.tree.leaves(abstract_model(config)[1]))


def split(model: nnx.Module) -> tuple[nnx.GraphDef, dict]:
    """Split a network into its structure and plain dictionaries of its parameters.

    `nnx.merge(graphdef, params)` is the inverse. Plain dictionaries keep flax's types
    out of checkpoints.
    """
    graphdef, params = nnx.split(model)
    return graphdef, nnx.to_pure_dict(params)


def abstract_model(config: NetworkConfig) -> tuple[nnx.GraphDef, dict]:
    """Return structure and parameters' shapes and dtypes of a config's network."""
    from swinsmt_jax import models  # whose `create` may have been replaced

    graphdef, params = _abstract_model(models.create, config)
    return graphdef, jax.tree.map(lambda leaf: leaf, params)  # the caller's own


@functools.cache
def _abstract_model(create, config):
    with initializers.undrawn():
        graphdef, params = split(create(config, rngs=_OneKey(0)))
    return graphdef, jax.tree.map(_shape_of, params)


class _OneKey(nnx.Rngs):
    """Gives every parameter one key, and so computes none."""

    @functools.cached_property
    def _only(self):
        return jax.random.key(0)

    def params(self):
        return self._only


def _shape_of(leaf):
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)
