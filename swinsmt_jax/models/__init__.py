"""The networks: one file each, and a function that makes one from its config."""

import functools

import jax
from flax import nnx

from swinsmt_jax import checks
from swinsmt_jax.config import ModelConfig, SwinSMTConfig, SwinUNETRConfig
from swinsmt_jax.models.nnformer import NNFormer
from swinsmt_jax.models.nnunet import NNUNet
from swinsmt_jax.models.swin_unetr import SwinUNETR
from swinsmt_jax.models.unetr import UNETR
from swinsmt_jax.models.ux_net import UXNet
from swinsmt_jax.network_config import (
    NNFormerConfig,
    PlainConvUNetConfig,
    ResidualEncoderUNetConfig,
    UNETRConfig,
    UXNetConfig,
)

NETWORKS = {
    SwinSMTConfig: SwinUNETR,
    SwinUNETRConfig: SwinUNETR,
    PlainConvUNetConfig: NNUNet,
    ResidualEncoderUNetConfig: NNUNet,
    UNETRConfig: UNETR,
    UXNetConfig: UXNet,
    NNFormerConfig: NNFormer,
}


def create(config: ModelConfig, *, rngs: nnx.Rngs) -> nnx.Module:
    """Build the network of a config with freshly initialised float32 parameters.

    Every network maps [B, D, H, W, C_in] to float32 logits [B, D, H, W, K], has a
    `config` and a `total_stride`, and holds nothing but `nnx.Param`. If its last layer
    is a 1 x 1 x 1 convolution, that is its `head`, and `features` maps the input to
    what that is applied to, [B, D, H, W, F].
    """
    checks.require(
        type(config) in NETWORKS,
        f"config is a {type(config).__name__}, but must be one of "
        f"{', '.join(c.__name__ for c in NETWORKS)}.",
    )
    return NETWORKS[type(config)](config, rngs=rngs)


def count_parameters(config: ModelConfig) -> int:
    """Count the parameters of a config's network without making them."""
    shapes = nnx.state(nnx.eval_shape(lambda: create(config, rngs=nnx.Rngs(0))))
    return sum(leaf.size for _, leaf in nnx.to_flat_state(shapes))


def split(model: nnx.Module) -> tuple[nnx.GraphDef, dict]:
    """Split a network into its structure and plain dictionaries of its parameters.

    `nnx.merge(graphdef, params)` is the inverse. Plain dictionaries keep flax's types
    out of checkpoints.
    """
    graphdef, params = nnx.split(model)
    return graphdef, nnx.to_pure_dict(params)


def abstract_model(config: ModelConfig) -> tuple[nnx.GraphDef, dict]:
    """Return structure and parameters' shapes and dtypes of a config's network."""
    graphdef, params = _abstract_model(config)
    return graphdef, jax.tree.map(lambda leaf: leaf, params)  # the caller's own


@functools.cache
def _abstract_model(config):
    return split(nnx.eval_shape(lambda: create(config, rngs=nnx.Rngs(0))))
