"""A small Swin SMT on one real CT at 3 mm, to send real anatomy through the chain.

    python -m swinsmt_jax.data.import_scan --ct=ct.nii.gz --labels=labels.nii.gz \
        --root=data/one_scan --case=s0001 --split=train,val,test
    python train.py --config=configs/real_scan.py --workdir=runs/real_scan
    python evaluate.py --workdir=runs/real_scan --split=test

A first guess that was not run to its end; no result is known to expect. The scan is
trained on and evaluated on, so a result says that orientation, spacing
and labels survive the chain, and nothing about other scans.
"""

from ml_collections import config_dict

from configs import demo


def get_config() -> config_dict.ConfigDict:
    config = demo.get_config()
    config.data.update({"root": "data/one_scan", "patch_shape": (64, 32, 32)})
    config.optimizer.update({"weight_decay": 0.0})
    config.training.update({"num_steps": 700})
    return config
