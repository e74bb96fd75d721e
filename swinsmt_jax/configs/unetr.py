"""UNETR with 32 features on 128^3 patches: 102,036,406 parameters.

    python train.py --config=configs/unetr.py --workdir=runs/unetr

A baseline of Swin SMT: data, optimiser and length are those of swin_smt_paper.py.
UNETR learns a position for every patch of 16^3 voxels, and so takes no other input
shape than `model.img_size`; change it together with `data.patch_shape`.
"""

from ml_collections import config_dict

from swinsmt_jax.configs import swin_smt_paper


def get_config() -> config_dict.ConfigDict:
    config = swin_smt_paper.get_config()
    config.model = config_dict.ConfigDict(
        {
            "name": "unetr",
            "in_channels": 1,
            "out_channels": 118,
            "img_size": (128, 128, 128),
            "feature_size": 32,
            "hidden_size": 768,
            "mlp_dim": 3072,
            "num_heads": 12,
            "qkv_bias": False,
            "dropout_rate": 0.0,
            "dtype": "bfloat16",
            "remat": ("encoder", "decoder"),
        }
    )
    return config
