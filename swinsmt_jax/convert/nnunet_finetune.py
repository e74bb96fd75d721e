"""The config of a fine-tuning: what the plan of a model folder of nnU-Net v2 says."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from absl import logging

from swinsmt_jax import checks
from swinsmt_jax.config import ExperimentConfig, from_config_dict, to_dict
from swinsmt_jax.convert import nnunet_folder
from swinsmt_jax.convert.nnunet_folder import ModelFolder, axes_of_scan, permuted
from swinsmt_jax.data import pipeline
from swinsmt_jax.data.spacing import Sides, plain

NAME = "nnunet_of_plan"  # stands for the network of the plan as config.model.name


def is_of_plan(values: Mapping) -> bool:
    """Whether a config leaves its network to the plan of a folder."""
    return "model" in values and values["model"].get("name") == NAME


def planned(values: Mapping, start_from: str | None) -> ExperimentConfig:
    """Return a config with network and view of a model folder, and classes of its data.

    Args:
        values: with `model.name` = `NAME`; keys that it has win over the plan.
        start_from: the folder.

    Raises:
        UserError: without such a folder, for a plan that normalises each scan by its
            own voxels, and as `nnunet_folder.read` and `from_config_dict`.
    """
    checks.require(
        bool(start_from) and nnunet_folder.is_folder(str(start_from)),
        f"this config takes its network from a model folder of nnU-Net, but "
        f"--start_from is {start_from!r}; give a folder such as "
        "Dataset001_X/nnUNetTrainer__nnUNetPlans__3d_fullres.",
    )
    folder = nnunet_folder.read(str(start_from), first=True)
    rule = folder.plan.normalization
    checks.require(
        rule.scheme == "CTNormalization",
        f"{folder.path} normalises each scan by its own voxels ({rule.scheme}), but "
        "networks are trained here with one clip, mean and deviation for all scans "
        "(CTNormalization); take a folder of CT.",
    )
    if not folder.plan.reoriented:
        logging.warning(
            "%s was trained on scans with the axes of their files, which it does not "
            "record. Here all scans are in RAS orientation. If the files had another "
            "one, the network first sees right and left or front and back exchanged.",
            folder.path,
        )
    given = {name: dict(part) for name, part in values.items()}
    axes = axes_of_scan(folder.plan)
    network = to_dict(permuted(folder.network, axes))
    own: dict[str, Any] = {
        "patch_shape": tuple(folder.plan.patch_shape[axis] for axis in axes),
        "batch_size": folder.plan.batch_size,
        "spacing": spacing_of(folder),
        "hu_range": (rule.low, rule.high),
        "normalization": (rule.mean, rule.std),
    }
    changes = {key: value for key, value in given["model"].items() if key != "name"}
    config = from_config_dict(
        given | {"model": network | changes, "data": own | given["data"]}
    )
    number = pipeline.class_map(config.data).num_classes
    return replace(config, model=replace(config.model, out_channels=number))


def spacing_of(folder: ModelFolder) -> Sides:
    """Return the sides in mm of its voxels, to the right, front and head."""
    spacing = folder.plan.spacing
    return plain([spacing[axis] for axis in axes_of_scan(folder.plan)])
