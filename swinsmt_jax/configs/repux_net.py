"""3D RepUX-Net with kernels of 21 voxels a side: 65,833,366 parameters.

    python train.py --config=configs/repux_net.py --workdir=runs/repux_net

A baseline of Swin SMT: data, optimiser and length are those of swin_smt_paper.py. Its
batch norm takes the statistics of the batch of all devices.
"""

from ml_collections import config_dict

from swinsmt_jax.configs import swin_smt_paper


def get_config() -> config_dict.ConfigDict:
    config = swin_smt_paper.get_config()
    config.model = config_dict.ConfigDict(
        {
            "name": "repux_net",
            "in_channels": 1,
            "out_channels": 118,
            "depths": (2, 2, 2, 2),
            "feat_size": (48, 96, 192, 384),
            "hidden_size": 768,
            "kernel_size": 21,
            "alpha": 1.0,
            "prior_rule": "fixed",
            "dtype": "bfloat16",
            "remat": ("encoder", "decoder"),
        }
    )
    return config
