"""nnFormer with an embedding of 192 on 96^3 patches: 149,960,014 parameters.

    python train.py --config=configs/nnformer.py --workdir=runs/nnformer

A baseline of Swin SMT: optimiser and length are those of swin_smt_paper.py, and so are
the data but for the patch. nnFormer's windows shrink to small grids and their tables
with them, and so it takes no other input shape than `model.crop_size`; change it
together with `data.patch_shape`.
"""

from ml_collections import config_dict

from swinsmt_jax.configs import swin_smt_paper


def get_config() -> config_dict.ConfigDict:
    config = swin_smt_paper.get_config()
    config.data.patch_shape = (96, 96, 96)
    config.model = config_dict.ConfigDict(
        {
            "name": "nnformer",
            "in_channels": 1,
            "out_channels": 118,
            "crop_size": (96, 96, 96),
            "embedding_dim": 192,
            "depths": (2, 2, 2, 2),
            "num_heads": (6, 12, 24, 48),
            "window_size": (4, 4, 8, 4),
            "drop_path_rate": 0.2,
            "dtype": "bfloat16",
            "remat": ("encoder", "decoder"),
        }
    )
    return config
