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
    """A map from volumes to logits: a config, `nnx.Param`, and perhaps buffers.

    Buffers are other `nnx.Variable`: arrays that no gradient moves, such as the running
    statistics of batch norm, or embeddings from a file. What a training step writes to
    them is carried on, saved and evaluated with the parameters.

    A network whose last layer is a 1 x 1 x 1 convolution with bias calls that `out` and
    has a method `features(x, rngs=None)`, from the input to what `out` is applied to,
    [B, D, H, W, F]: it is then trained without making logits. So is one whose head
    depends on the image, with a method `features_and_head(x, rngs=None)`: what that
    must be, `training.losses.Loss.of_head` says. Others override `__call__`.

    Args:
        config: a `NetworkConfig`.
    """

    out: Callable[[jax.Array], jax.Array]
    features: Callable[..., jax.Array]

    def __init__(self, config: NetworkConfig):
        self.config = config

    @property
    def total_stride(self) -> int | tuple[int, ...]:
        """Divisor of every side of the input."""
        return self.config.total_stride

    @property
    def head(self) -> Callable[[jax.Array], jax.Array]:
        """The last layer, from features to logits."""
        return self.out

    def __call__(self, x: jax.Array, *, rngs: nnx.Rngs | None = None) -> jax.Array:
        """Segment a batch of volumes.

        Args:
            x: [B, D, H, W, C_in].
            rngs: given in training, it switches dropout, drop path and the statistics
                of the batch on; without it the result is deterministic.

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
    params, _ = split_buffers(*abstract_model(config))
    return sum(leaf.size for leaf in jax.tree.leaves(params))


def split(model: nnx.Module) -> tuple[nnx.GraphDef, dict]:
    """Split a network into its structure and plain dictionaries of its arrays.

    `nnx.merge(graphdef, arrays)` is the inverse. Plain dictionaries keep flax's types
    out of checkpoints.
    """
    graphdef, arrays = nnx.split(model)
    return graphdef, nnx.to_pure_dict(arrays)


def split_buffers(graphdef: nnx.GraphDef, arrays: dict) -> tuple[dict, dict]:
    """Return the parameters among a network's arrays, and its buffers."""
    if not arrays:
        return {}, {}
    model = nnx.merge(graphdef, arrays)
    _, params, *rest = nnx.split(model, nnx.Param, ...)
    return nnx.to_pure_dict(params), nnx.to_pure_dict(rest[0])


def merge_buffers(params: dict, buffers: dict) -> dict:
    """Return the arrays of a network, the inverse of `split_buffers`."""
    if not buffers:
        return params
    flat = [nnx.traversals.flatten_mapping(part) for part in (params, buffers)]
    return nnx.traversals.unflatten_mapping(flat[0] | flat[1])


def abstract_model(config: NetworkConfig) -> tuple[nnx.GraphDef, dict]:
    """Return structure and arrays' shapes and dtypes of a config's network.

    No file that the config names is read.
    """
    from swinsmt_jax import models  # whose `create` may have been replaced

    graphdef, arrays = _abstract_model(models.create, config)
    return graphdef, jax.tree.map(lambda leaf: leaf, arrays)  # the caller's own


@functools.cache
def _abstract_model(create, config):
    with initializers.undrawn():
        graphdef, arrays = split(create(config, rngs=_OneKey(0)))
    return graphdef, jax.tree.map(_shape_of, arrays)


class _OneKey(nnx.Rngs):
    """Gives every parameter one key, and so computes none."""

    @functools.cached_property
    def _only(self):
        return jax.random.key(0)

    def params(self):
        return self._only


def _shape_of(leaf):
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)
