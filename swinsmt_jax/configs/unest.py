"""UNesT, "base", on 96^3 patches: 87,204,663 parameters.

    python train.py --config=configs/unest.py --workdir=runs/unest

A baseline of Swin SMT: optimiser and length are those of swin_smt_paper.py, and so are
the data but for the patch. UNesT learns a position for every token, and so takes no
other input shape than a cube of `model.img_size`; change it together with
`data.patch_shape`. "Small" has half of `feature_size`, `embed_dim` and `num_heads`;
"large" has one and a half times as many, and depths of (2, 2, 20).
"""

from ml_collections import config_dict

from swinsmt_jax.configs import swin_smt_paper


def get_config() -> config_dict.ConfigDict:
    config = swin_smt_paper.get_config()
    config.data.patch_shape = (96, 96, 96)
    config.model = config_dict.ConfigDict(
        {
            "name": "unest",
            "in_channels": 1,
            "out_channels": 118,
            "img_size": (96, 96, 96),
            "feature_size": 16,
            "embed_dim": (128, 256, 512),
            "depths": (2, 2, 8),
            "num_heads": (4, 8, 16),
            "drop_path_rate": 0.5,
            "dtype": "bfloat16",
            "remat": ("encoder", "decoder"),
        }
    )
    return config
