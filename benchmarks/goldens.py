"""The golden tensors of the PyTorch networks, and the networks they are of."""

from collections.abc import Mapping
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from swinsmt_jax import SwinSMTConfig, SwinUNETRConfig, checks, convert, models
from swinsmt_jax.models.dints import DiNTSConfig
from swinsmt_jax.models.nnformer import NNFormerConfig
from swinsmt_jax.models.nnunet import PlainConvUNetConfig, ResidualEncoderUNetConfig
from swinsmt_jax.models.repux_net import RepUXNetConfig
from swinsmt_jax.models.unest import UNesTConfig
from swinsmt_jax.models.unetr import UNETRConfig
from swinsmt_jax.models.universal_model import UniversalModelConfig
from swinsmt_jax.models.ux_net import UXNetConfig

NETWORKS = {
    "swin_smt_f12_e4": SwinSMTConfig(
        in_channels=1,
        out_channels=5,
        feature_size=12,
        num_experts=4,
        num_moe_stages=3,
        patch_merging="legacy",
    ),
    "swin_unetr_v2_f12_octants": SwinUNETRConfig(
        in_channels=1,
        out_channels=5,
        feature_size=12,
        residual_conv=True,
        patch_merging="octants",
    ),
}
# The networks that Swin SMT is compared with.
ZOO = {
    "zoo/nnunet_plain_small": PlainConvUNetConfig(
        in_channels=1,
        out_channels=5,
        features_per_stage=(8, 16, 24, 32),
        strides=(1, 2, 2, 2),
    ),
    "zoo/nnunet_resenc_small": ResidualEncoderUNetConfig(
        in_channels=1,
        out_channels=5,
        features_per_stage=(8, 16, 24, 32),
        strides=(1, 2, 2, 2),
        n_blocks_per_stage=(1, 3, 4, 6),
    ),
    "zoo/unetr_small": UNETRConfig(
        in_channels=1,
        out_channels=5,
        img_size=(48, 32, 64),
        feature_size=4,
        hidden_size=48,
        mlp_dim=96,
        num_heads=4,
    ),
    "zoo/ux_net_small": UXNetConfig(
        in_channels=1, out_channels=5, feat_size=(48, 16, 24, 32), hidden_size=48
    ),
    "zoo/repux_net_small": RepUXNetConfig(
        in_channels=1,
        out_channels=5,
        depths=(1, 2, 1, 1),
        feat_size=(48, 16, 24, 32),
        hidden_size=48,
    ),
    "zoo/universal_model_small": UniversalModelConfig(
        in_channels=1,
        out_channels=4,
        feature_size=8,
        num_heads=(1, 2, 4, 8),
        embeddings="random",  # as a buffer, which the golden fills
        text_size=24,
        hidden=16,
        groups=4,
        zero_plane=False,
    ),
    "zoo/nnformer_small": NNFormerConfig(
        in_channels=1,
        out_channels=5,
        crop_size=64,
        embedding_dim=24,
        num_heads=(3, 6, 12, 24),
    ),
    "zoo/unest_small": UNesTConfig(
        in_channels=1,
        out_channels=5,
        img_size=64,
        feature_size=2,
        embed_dim=(16, 32, 64),
        depths=(1, 2, 3),
        num_heads=(2, 4, 4),
    ),
    "zoo/dints_small": DiNTSConfig(in_channels=1, out_channels=5, channel_mul=3 / 32),
}


def read(goldens: Path, name: str) -> dict:
    """Return the arrays of a golden.

    Raises:
        UserError: if it is not there.
    """
    file = goldens / f"{name}.npz"
    checks.require(
        file.is_file(),
        f"there is no {file}, but figures are measured on golden tensors; set "
        "--goldens to the folder that holds modules.npz and the networks' files (they "
        "are not part of the repository). Without them, `make test-reference` compares "
        "with PyTorch itself.",
    )
    return dict(np.load(file))


def part(golden: Mapping, prefix: str) -> dict:
    """Return the arrays whose names begin with a prefix, without it."""
    return {k.removeprefix(prefix): golden[k] for k in golden if k.startswith(prefix)}


def loaded(config, state_dict: Mapping):
    """Return graph and parameters of a network with PyTorch's parameters."""
    graphdef, params = nnx.split(
        nnx.eval_shape(lambda: models.create(config, rngs=nnx.Rngs(0)))
    )
    params = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), params)
    model = nnx.merge(graphdef, params)
    convert.load_torch(model, state_dict)
    return nnx.split(model)
