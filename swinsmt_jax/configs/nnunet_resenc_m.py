"""nnU-Net with a residual encoder, preset M: the network of L on smaller patches.

    python train.py --config=configs/nnunet_resenc_m.py --workdir=runs/nnunet_resenc_m

The presets plan patch and batch for GPUs of different memory and follow from them the
number of stages. 96^3 is our choice here: with it the stages, and so the 102,443,150
parameters, are those of nnunet_resenc_l.py.
"""

from ml_collections import config_dict

from swinsmt_jax.configs import nnunet_resenc_l


def get_config() -> config_dict.ConfigDict:
    config = nnunet_resenc_l.get_config()
    config.data.patch_shape = (96, 96, 96)
    return config
