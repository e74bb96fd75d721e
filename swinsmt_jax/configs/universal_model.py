"""CLIP-Driven Universal Model with learned embeddings: 62,493,939 parameters.

    python train.py --config=configs/universal_model.py --workdir=runs/universal_model

A baseline of Swin SMT: data, optimiser and length are those of swin_smt_paper.py; the
loss is its own, one class against all others. With --config.model.embeddings=FILE the
classes are told apart by text: docs/networks.md says how to make such a file.
"""

from ml_collections import config_dict

from swinsmt_jax.configs import swin_smt_paper


def get_config() -> config_dict.ConfigDict:
    config = swin_smt_paper.get_config()
    with config.unlocked():
        del config.model.num_experts
        del config.model.num_moe_stages
        config.model.embeddings = "learned"
    config.model.name = "universal_model"
    config.training.loss = "one_vs_all"
    return config
