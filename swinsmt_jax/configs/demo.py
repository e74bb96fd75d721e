"""A small Swin SMT on phantom scans: minutes on two CPU cores.

    python -m swinsmt_jax.phantoms --root=data/phantoms --cases=80 --val=8 \
        --test=8 --spacing=12 --seed=1
    python train.py --config=configs/demo.py --workdir=runs/demo
    python evaluate.py --workdir=runs/demo --split=test

`make demo` runs all three. The voxels are coarse and the windows small so that a step
takes well under a second: what is learnt is where things are.
"""

from ml_collections import config_dict

from swinsmt_jax.configs import swin_smt_paper


def get_config() -> config_dict.ConfigDict:
    config = swin_smt_paper.get_config()
    config.model.update(
        {
            "feature_size": 24,
            "num_experts": 4,
            "window_size": (4, 4, 4),
            "dtype": "float32",
            "remat": (),
        }
    )
    config.data.update(
        {
            "root": "data/phantoms",
            "patch_shape": (32, 32, 32),
            "batch_size": 1,
            "spacing": 0.0,  # the phantoms' own
            "hu_range": (-250.0, 450.0),  # soft tissue takes most of the scale
            "foreground_ratio": 0.9,  # most of a phantom is air
            "augmentations": {
                "zoom": {"probability": 0.0},
                "rotate": {"probability": 0.0},
            },
            "num_threads": 2,
            "cache": True,
        }
    )
    config.optimizer.update({"learning_rate": 8e-3, "warmup_steps": 50, "b2": 0.95})
    config.training.update(
        {
            "num_steps": 1300,
            "log_every": 20,
            "eval_every": 0,
            "eval_cases": 1,
            "checkpoint_every": 200,
        }
    )
    return config
