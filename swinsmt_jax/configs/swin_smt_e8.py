"""Swin SMT with 8 experts, 87,014,728 parameters; all else as in the paper's config.

    python train.py --config=configs/swin_smt_e8.py --workdir=runs/swin_smt_e8

To expect: a point in the study of the number of experts; swin_smt_paper.py has 32.
"""

from ml_collections import config_dict

from swinsmt_jax.configs import swin_smt_paper


def get_config() -> config_dict.ConfigDict:
    config = swin_smt_paper.get_config()
    config.model.num_experts = 8
    return config
