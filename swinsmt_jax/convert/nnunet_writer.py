"""Write a model folder with which nnU-Net v2 itself predicts, without PyTorch."""

import json
from collections.abc import Sequence
from pathlib import Path

from swinsmt_jax import checks
from swinsmt_jax.convert import files
from swinsmt_jax.convert.nnunet_folder import (
    BLOCKS,
    CHECKPOINT,
    FIELDS,
    FIXED,
    NETWORKS,
    permuted,
    permuted_weights,
)
from swinsmt_jax.convert.torch_state import to_torch
from swinsmt_jax.data import nnunet_plan
from swinsmt_jax.models import Network
from swinsmt_jax.models.nnunet import triple
from swinsmt_jax.runtime.files import absolute, replacing, writable

MODULE = "dynamic_network_architectures.architectures.unet"


def write(
    folder: str | Path,
    model: Network,
    *,
    patch_shape: Sequence[int],
    spacing: Sequence[float],
    batch_size: int,
    clip: Sequence[float],
    mean: float,
    std: float,
    names: Sequence[str],
) -> Path:
    """Write a model folder with which nnU-Net v2 predicts; return its path.

    Args:
        folder: of the dataset, such as Dataset001_X; must not be there.
        model: one of nnU-Net's networks, its axes those of a scan in RAS orientation.
        patch_shape, spacing: of these axes.
        batch_size: of the training.
        clip, mean, std: of the CT's normalisation, in HU.
        names: of the label ids, the background first.

    Raises:
        UserError: for another network, and an existing folder.
    """
    folder = absolute(folder)
    checks.require(
        isinstance(model.config, tuple(NETWORKS.values())),
        f"nnU-Net has no network of {type(model.config).__name__}; it has "
        f"{checks.listed(NETWORKS)}.",
    )
    checks.require(
        not folder.exists(), f"{folder} exists; give another --output, or remove it."
    )
    config = permuted(model.config, (2, 1, 0))  # nnU-Net reads [z, y, x]
    intensities = {
        **{"percentile_00_5": clip[0], "percentile_99_5": clip[1]},
        **{"min": clip[0], "max": clip[1], "median": mean, "mean": mean, "std": std},
    }
    plans = {
        "dataset_name": folder.name,
        "plans_name": "nnUNetPlans",
        "original_median_spacing_after_transp": list(spacing[::-1]),
        "original_median_shape_after_transp": list(patch_shape[::-1]),
        "image_reader_writer": "NibabelIOWithReorient",
        "transpose_forward": [0, 1, 2],
        "transpose_backward": [0, 1, 2],
        "configurations": {
            "3d_fullres": _written(config, patch_shape[::-1], spacing[::-1], batch_size)
        },
        "experiment_planner_used": "ExperimentPlanner",
        "label_manager": "LabelManager",
        nnunet_plan.CHANNELS: {"0": {k: float(v) for k, v in intensities.items()}},
    }
    dataset = {
        "channel_names": {"0": "CT"},
        "labels": {name: number for number, name in enumerate(names)},
        "numTraining": 0,
        "file_ending": ".nii.gz",
        "overwrite_image_reader_writer": "NibabelIOWithReorient",
    }
    checkpoint = {
        "network_weights": permuted_weights(to_torch(model), (2, 1, 0)),
        "trainer_name": "nnUNetTrainer",
        "init_args": {
            **{"plans": plans, "dataset_json": dataset},
            **{"configuration": "3d_fullres", "fold": 0},
        },
        "inference_allowed_mirroring_axes": None,
    }
    with writable(folder):
        folder.parent.mkdir(parents=True, exist_ok=True)
    with writable(folder), replacing(folder) as partial:
        target = partial / "nnUNetTrainer__nnUNetPlans__3d_fullres"
        (target / "fold_0").mkdir(parents=True)
        for name, content in (
            (nnunet_plan.PLANS, plans),
            (nnunet_plan.DATASET, dataset),
        ):
            (target / name).write_text(json.dumps(content, indent=4))
        files.write_document(target / "fold_0" / CHECKPOINT, checkpoint)
    return folder / target.name


def _written(config, patch_shape, spacing, batch_size):
    """Return a configuration of plans.json."""
    resampling, arguments = nnunet_plan.RESAMPLING, {}
    for key in (*FIELDS, *BLOCKS):
        if hasattr(config, key):
            value = getattr(config, key)
            arguments[key] = [*value]
    for key in ("strides", "kernel_sizes"):
        arguments[key] = [list(triple(value)) for value in arguments[key]]
    found = {
        **{"data_identifier": "nnUNetPlans_3d_fullres"},
        **{"preprocessor_name": "DefaultPreprocessor", "batch_size": batch_size},
        **{"patch_size": list(patch_shape), "spacing": list(map(float, spacing))},
        "median_image_size_in_voxels": list(patch_shape),
        "normalization_schemes": ["CTNormalization"],
        "use_mask_for_norm": [False],
        "batch_dice": False,
    }
    for what, order in (("data", 3), ("seg", 1), ("probabilities", 1)):
        found[f"resampling_fn_{what}"] = resampling
        found[f"resampling_fn_{what}_kwargs"] = {
            **{"is_seg": what == "seg", "order": order},
            **{"order_z": 0, "force_separate_z": None},
        }
    name = next(n for n, cls in NETWORKS.items() if isinstance(config, cls))
    found["architecture"] = {
        "network_class_name": f"{MODULE}.{name}",
        "arch_kwargs": {
            "n_stages": len(config.features_per_stage),
            **arguments,
            **{key: FIXED[key] for key in ("conv_op", "conv_bias", "norm_op")},
            "norm_op_kwargs": {"eps": 1e-5, "affine": True},
            **{"dropout_op": None, "dropout_op_kwargs": None},
            **{"nonlin": FIXED["nonlin"], "nonlin_kwargs": {"inplace": True}},
        },
        "_kw_requires_import": ["conv_op", "norm_op", "dropout_op", "nonlin"],
    }
    return found
