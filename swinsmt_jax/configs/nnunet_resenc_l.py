"""nnU-Net with a residual encoder, preset L: 102,443,150 parameters.

    python train.py --config=configs/nnunet_resenc_l.py --workdir=runs/nnunet_resenc_l

A baseline of Swin SMT: data, optimiser and length are those of swin_smt_paper.py, not
those that nnU-Net would plan for itself.
"""

from ml_collections import config_dict

from swinsmt_jax.configs import swin_smt_paper


def get_config() -> config_dict.ConfigDict:
    config = swin_smt_paper.get_config()
    config.model = config_dict.ConfigDict(
        {
            "name": "nnunet_resenc",
            "in_channels": 1,
            "out_channels": 118,
            "features_per_stage": (32, 64, 128, 256, 320, 320),
            "strides": (1, 2, 2, 2, 2, 2),
            "n_blocks_per_stage": (1, 3, 4, 6, 6, 6),
            "n_conv_per_stage_decoder": (1, 1, 1, 1, 1),
            "dtype": "bfloat16",
            "remat": ("encoder", "decoder"),
        }
    )
    return config
