"""3D UX-Net with 48 to 384 features: 53,011,606 parameters.

    python train.py --config=configs/ux_net.py --workdir=runs/ux_net

A baseline of Swin SMT: data, optimiser and length are those of swin_smt_paper.py.
"""

from ml_collections import config_dict

from swinsmt_jax.configs import swin_smt_paper


def get_config() -> config_dict.ConfigDict:
    config = swin_smt_paper.get_config()
    config.model = config_dict.ConfigDict(
        {
            "name": "ux_net",
            "in_channels": 1,
            "out_channels": 118,
            "depths": (2, 2, 2, 2),
            "feat_size": (48, 96, 192, 384),
            "hidden_size": 768,
            "drop_path_rate": 0.0,
            "layer_scale_init_value": 1e-6,
            "dtype": "bfloat16",
            "remat": ("encoder", "decoder"),
        }
    )
    return config
