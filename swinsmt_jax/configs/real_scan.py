"""A small Swin SMT overfits one real CT.

    python -m swinsmt_jax.data.import_scan --ct=ct.nii.gz --labels=labels.nii.gz \
        --root=data/one_scan --case=s0001 --split=train,val,test
    python train.py --config=configs/real_scan.py --workdir=runs/real_scan
    python evaluate.py --workdir=runs/real_scan --split=test

The scan is trained on and evaluated on, so a result says that orientation, spacing
and labels survive the chain, and nothing about other scans. The network sees all of a
scan of up to 37 cm at once, at 5.75 mm: one whole view is learnt far sooner than crops.
Its probabilities are brought back to the scan's own voxels, and evaluated there. Expect
a mean Dice of 0.80 after 10 minutes on two CPU cores.
"""

from ml_collections import config_dict

from swinsmt_jax.configs import demo


def get_config() -> config_dict.ConfigDict:
    config = demo.get_config()
    config.model.update({"feature_size": 12, "num_moe_stages": 2})
    config.data.update(
        {
            "root": "data/one_scan",
            "patch_shape": (64, 64, 64),
            "spacing": 5.75,
            "hu_range": (-200.0, 400.0),  # soft tissue takes most of the scale
            "augmentations": {"intensity": {"probability": 0.0}},
        }
    )
    config.optimizer.update(
        {"learning_rate": 1.5e-2, "warmup_steps": 20, "weight_decay": 0.0}
    )
    config.training.update({"num_steps": 400})
    return config
