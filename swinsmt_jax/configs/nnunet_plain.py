"""Plain nnU-Net, six stages of 32 to 320 features: 31,288,974 parameters.

    python train.py --config=configs/nnunet_plain.py --workdir=runs/nnunet_plain

A baseline of Swin SMT: data, optimiser and length are those of swin_smt_paper.py, not
those that nnU-Net would plan for itself.
"""

from ml_collections import config_dict

from swinsmt_jax.configs import swin_smt_paper


def get_config() -> config_dict.ConfigDict:
    config = swin_smt_paper.get_config()
    config.model = config_dict.ConfigDict(
        {
            "name": "nnunet_plain",
            "in_channels": 1,
            "out_channels": 118,
            "features_per_stage": (32, 64, 128, 256, 320, 320),
            "strides": (1, 2, 2, 2, 2, 2),
            "n_conv_per_stage": (2, 2, 2, 2, 2, 2),
            "n_conv_per_stage_decoder": (2, 2, 2, 2, 2),
            "dtype": "bfloat16",
            "remat": ("encoder", "decoder"),
        }
    )
    return config
