"""Fine-tune a model folder of nnU-Net v2, TotalSegmentator's among them.

    python preprocess.py --source=data/mine --store=stores/mine --nnunet=FOLDER
    python train.py --config=configs/nnunet_finetune.py --workdir=runs/nnunet_finetune \
        --start_from=FOLDER --config.data.root=stores/mine

Network, spacing, normalisation, patch and batch come from the plan of --start_from,
classes from the data; what is set here or by a flag wins over the plan. Outputs of
classes that the folder has too are kept, by name. A tenth of the usual rate, and
mirroring off, keep what it knows; see docs/nnunet.md.
"""

from ml_collections import config_dict

from swinsmt_jax.configs import swin_smt_paper


def get_config() -> config_dict.ConfigDict:
    config = swin_smt_paper.get_config()
    config.model = config_dict.ConfigDict(
        {
            "name": "nnunet_of_plan",
            "dtype": "bfloat16",
            "remat": ("encoder", "decoder"),
        }
    )
    for key in ("patch_shape", "batch_size", "spacing", "hu_range"):
        del config.data[key]
    config.data.num_threads = 8
    config.inference.convention = "nnunet"
    config.optimizer.update({"learning_rate": 1e-4, "warmup_steps": 100})
    config.training.update(
        {"num_steps": 10_000, "eval_every": 1000, "checkpoint_every": 500}
    )
    return config
