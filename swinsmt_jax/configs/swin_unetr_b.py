"""Swin UNETR B ("v2": residual blocks before the stages), 72,767,752 parameters.

    python train.py --config=configs/swin_unetr_b.py --workdir=runs/swin_unetr_b

The baseline of Swin SMT: data, optimiser and length are those of swin_smt_paper.py.
"""

from ml_collections import config_dict

from swinsmt_jax.configs import swin_smt_paper


def get_config() -> config_dict.ConfigDict:
    config = swin_smt_paper.get_config()
    with config.unlocked():
        del config.model.num_experts
        del config.model.num_moe_stages
    config.model.name = "swin_unetr"
    config.model.residual_conv = True
    return config
