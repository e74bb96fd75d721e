"""Swin UNETR L: 96 features, 290.40 million parameters; all else as in swin_unetr_b.py.

    python train.py --config=configs/swin_unetr_l.py --workdir=runs/swin_unetr_l

To expect: a larger baseline of Swin SMT beside swin_unetr_b.py.
"""

from ml_collections import config_dict

from swinsmt_jax.configs import swin_unetr_b


def get_config() -> config_dict.ConfigDict:
    config = swin_unetr_b.get_config()
    config.model.feature_size = 96
    return config
