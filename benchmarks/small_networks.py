"""Small forms of the compared networks, for phantoms and minutes on a CPU.

All are of about the demo's operations or fewer; none has the published width. What a
small form says about the full one is unknown.
"""

from ml_collections import config_dict

from swinsmt_jax import checks
from swinsmt_jax.configs import demo

SWIN = {
    "patch_merging": "legacy",
    "depths": (2, 2, 2, 2),
    "num_heads": (3, 6, 12, 24),
    "window_size": (4, 4, 4),
}
# Values of the keys SIZED are by size; "small" has the demo's width.
MODELS = {
    "swin_unetr": {"feature_size": (12, 24), **SWIN},
    "swin_smt": {
        "feature_size": (12, 24),
        "num_experts": 4,
        "num_moe_stages": 3,
        **SWIN,
    },
    "nnunet_plain": {
        "features_per_stage": ((8, 16, 32, 64), (16, 32, 64, 128)),
        "strides": (1, 2, 2, 2),
    },
    "nnunet_resenc": {
        "features_per_stage": ((8, 16, 32, 64), (16, 32, 64, 128)),
        "strides": (1, 2, 2, 2),
        "n_blocks_per_stage": (1, 2, 2, 2),
    },
    "unetr": {
        "feature_size": (8, 16),
        "hidden_size": (96, 192),
        "mlp_dim": (192, 384),
        "num_heads": 6,
    },
    "ux_net": {
        "feat_size": ((12, 24, 48, 96), (24, 48, 96, 192)),
        "hidden_size": (192, 384),
    },
    "repux_net": {
        "feat_size": ((12, 24, 48, 96), (24, 48, 96, 192)),
        "hidden_size": (192, 384),
    },
    "universal_model": {
        "feature_size": (12, 24),
        "hidden": (64, 128),
        "groups": 4,
        **SWIN,
    },
    "nnformer": {
        "embedding_dim": (24, 48),
        "num_heads": (3, 6, 12, 24),
        "drop_path_rate": 0.0,
    },
    "dints": {"channel_mul": (0.25, 0.5)},
}
SIZES = ("tiny", "small")
SIZED = (
    "feature_size",
    "features_per_stage",
    "hidden_size",
    "hidden",
    "mlp_dim",
    "feat_size",
    "embedding_dim",
    "channel_mul",
)
FIXED = {"unetr": "img_size", "nnformer": "crop_size"}  # take one input shape alone


def experiment(
    name: str, *, size: str, patch_shape: tuple[int, int, int], classes: int = 118
) -> config_dict.ConfigDict:
    """Return the demo's config with another network."""
    checks.one_of("an entry of --models", name, MODELS)
    checks.one_of("--size", size, SIZES)
    model = {"name": name, "in_channels": 1, "out_channels": classes}
    for key, value in MODELS[name].items():
        model[key] = value[SIZES.index(size)] if key in SIZED else value
    if name in FIXED:
        model[FIXED[name]] = patch_shape
    config = demo.get_config()
    config.model = config_dict.ConfigDict(model)
    config.data.patch_shape = patch_shape
    return config
