"""DiNTS with the published architecture: 152,364,822 parameters.

    python train.py --config=configs/dints.py --workdir=runs/dints

A baseline of Swin SMT: data, optimiser and length are those of swin_smt_paper.py.
`model.architecture` may be a file with what a search of your own found; see
docs/networks.md.
"""

from ml_collections import config_dict

from swinsmt_jax.configs import swin_smt_paper


def get_config() -> config_dict.ConfigDict:
    config = swin_smt_paper.get_config()
    config.model = config_dict.ConfigDict(
        {
            "name": "dints",
            "in_channels": 1,
            "out_channels": 118,
            "architecture": "published",
            "channel_mul": 1.0,
            "use_downsample": True,
            "dtype": "bfloat16",
            "remat": ("encoder", "decoder"),
        }
    )
    return config
