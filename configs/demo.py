"""A small Swin SMT on phantom scans: minutes on a laptop's CPU.

    python -m swinsmt_jax.data.phantom --root=data/phantoms --cases=24 --spacing=6
    python train.py --config=configs/demo.py --workdir=runs/demo
    python evaluate.py --workdir=runs/demo --split=test

The second and third command are what `make demo` runs, after the first.
"""

from ml_collections import config_dict

from configs import swin_smt_paper


def get_config() -> config_dict.ConfigDict:
    config = swin_smt_paper.get_config()
    config.model.update(
        {
            "feature_size": 12,
            "num_experts": 4,
            "window_size": (4, 4, 4),  # half the time of a step on CPU
            "dtype": "float32",
            "remat": (),
        }
    )
    config.data.update(
        {
            "root": "data/phantoms",
            "patch_shape": (64, 64, 64),
            "batch_size": 2,
            "spacing": 0.0,  # the phantoms' own
            "num_threads": 2,
            "cache": True,
        }
    )
    config.optimizer.update({"learning_rate": 2e-3, "warmup_steps": 20})
    config.training.update(
        {
            "num_steps": 300,
            "log_every": 10,
            "eval_every": 0,
            "eval_cases": 1,
            "checkpoint_every": 100,
        }
    )
    return config
