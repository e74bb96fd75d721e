"""Model folders of nnU-Net v2: the plan's network, and the weights of the folds."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import logging
from flax import nnx

from swinsmt_jax import checks
from swinsmt_jax.convert import files
from swinsmt_jax.convert.torch_state import load_torch, to_torch
from swinsmt_jax.data import nnunet_plan
from swinsmt_jax.data.nnunet_plan import Plan
from swinsmt_jax.models import abstract_model
from swinsmt_jax.models.nnunet import (
    PlainConvUNetConfig,
    PyramidConfig,
    ResidualEncoderUNetConfig,
    triple,
)
from swinsmt_jax.runtime.files import absolute

CHECKPOINT = "checkpoint_final.pth"
NETWORKS: dict[str, type[PyramidConfig]] = {
    "PlainConvUNet": PlainConvUNetConfig,
    "ResidualEncoderUNet": ResidualEncoderUNetConfig,
}
FIELDS = ("features_per_stage", "strides", "kernel_sizes", "n_conv_per_stage_decoder")
BLOCKS = ("n_conv_per_stage", "n_blocks_per_stage")
FIXED = {  # arguments of a network that have one value here
    "conv_op": "torch.nn.modules.conv.Conv3d",
    "conv_bias": True,
    "norm_op": "torch.nn.modules.instancenorm.InstanceNorm3d",
    "nonlin": "torch.nn.LeakyReLU",
    "nonlin_first": False,
    "squeeze_excitation": False,
    "bottleneck_channels": None,
    "bottleneck_block": None,
}
UNUSED = {  # they act in training alone
    *("class", "n_stages", "deep_supervision"),
    *("dropout_op", "dropout_op_kwargs", "stochastic_depth_p"),
}
NORM = {"eps": (1e-5,), "affine": (True,), "track_running_stats": (False,)}
SLOPE = {"negative_slope": (0.01,), "inplace": (True, False)}
# What the names of nnU-Net's trainers say of schedule, augmentation, loss and so on.
TRAINER = re.compile(
    r"nnUNetTrainer(?:_?(?:NoMirroring|onlyMirror01|\d+ep(?:ochs?)?|NoDA|noDummy2DDA"
    r"|DA5|DASegOrd0|Segord0|ord0|DiceLoss|DiceCELoss|CELoss|noSmooth|DiceTopK10Loss"
    r"|Topk10Loss|LS01|CosAnneal|warmup|(?:Vanilla)?Adam|Adan|\den\d"
    r"|NoDeepSupervision|probabilisticOversampling|0\d\d|Benchmark|noDataLoading))*"
)


@dataclass(frozen=True)
class ModelFolder:
    """A model folder, read.

    Attributes:
        path: of the folder.
        configuration: of the plan, such as 3d_fullres.
        plan: how scans are seen.
        network: its config, of the axes that the plan has.
        folds: names of the folds.
        models: the network with the weights of each fold.
        mirror_axes: axes of the network's input that prediction may mirror.
    """

    path: Path
    configuration: str
    plan: Plan
    network: PyramidConfig
    folds: tuple[str, ...]
    models: tuple[nnx.Module, ...]
    mirror_axes: tuple[int, ...]


def read(
    folder: str | Path, *, folds: Sequence[str] = (), first: bool = False
) -> ModelFolder:
    """Read a model folder without PyTorch, and without running what a pickle says.

    Args:
        folder: with plans.json, or a dataset's with one such folder in it.
        folds: numbers, or "all" for fold_all, or every fold where there is none; none
            takes every fold_<number> with a final checkpoint.
        first: take the first of these alone.

    Raises:
        UserError: for what is missing, damaged or not supported; see the functions
            below.
    """
    path = find(folder)
    names = _folds(path, folds)[: 1 if first else None]
    read = [files.read_document(path / name / CHECKPOINT) for name in names]
    configuration, axes = _facts(read[0], path / names[0] / CHECKPOINT)
    plan = nnunet_plan.read(path, configuration)
    with checks.named(path / nnunet_plan.PLANS):
        network = network_of(plan.network, channels=plan.channels)
        network.check_patch("patch_size", plan.patch_shape)
    models = tuple(
        _model(network, document, path / name / CHECKPOINT)
        for name, document in zip(names, read, strict=True)
    )
    return ModelFolder(path, configuration, plan, network, names, models, axes)


def find(folder: str | Path) -> Path:
    """Return the model folder; `UserError` unless there is exactly one."""
    path = absolute(folder)
    checks.require(path.is_dir(), f"the model folder {path} does not exist.")
    if (path / nnunet_plan.PLANS).is_file():
        return path
    found = sorted(file.parent for file in path.glob(f"*__*__*/{nnunet_plan.PLANS}"))
    checks.require(
        len(found) == 1,
        f"{path} holds no {nnunet_plan.PLANS} and {len(found)} model folders"
        f"{': ' if found else ''}{checks.listed(f.name for f in found)}; give a folder "
        "such as Dataset001_X/nnUNetTrainer__nnUNetPlans__3d_fullres.",
    )
    return found[0]


def is_folder(path: str | Path) -> bool:
    """Whether a path is a model folder, or a dataset's that has some."""
    path = absolute(path)
    return path.is_dir() and any(
        next(path.glob(pattern), None)
        for pattern in (nnunet_plan.PLANS, f"*__*__*/{nnunet_plan.PLANS}")
    )


def folds_of(path: Path) -> list[str]:
    """Return the folds of a model folder that have a final checkpoint, in order."""
    files = path.glob(f"fold_*/{CHECKPOINT}")
    names = [file.parent.name.removeprefix("fold_") for file in files]
    return sorted(names, key=lambda name: (len(name), name))


def _folds(path, wanted):
    there = folds_of(path)
    every = [name for name in there if name.isdecimal()] or [*{*there} & {"all"}]
    checks.require(
        bool(there),
        f"{path} has no fold with a {CHECKPOINT}, such as fold_0/{CHECKPOINT}.",
    )
    names = [str(name).removeprefix("fold_") for name in wanted] or every
    if names == ["all"] and "all" not in there:
        logging.warning(
            "%s has no fold_all; --folds=all takes its folds %s",
            *(path, checks.listed(every)),
        )
        names = every
    for name in names:
        checks.require(
            name in there,
            f"{path} has no fold_{name} with a {CHECKPOINT}; its folds are "
            f"{checks.listed(there)}.",
        )
    return tuple(f"fold_{name}" for name in dict.fromkeys(names))


def _facts(document, where):
    """Return the configuration and mirroring axes of a checkpoint."""
    about, trainer = document.get("init_args"), document.get("trainer_name")
    checks.require(
        isinstance(about, Mapping) and isinstance(about.get("configuration"), str),
        f"{where} does not name its configuration (init_args); it is not a "
        "checkpoint of nnU-Net v2.",
    )
    checks.require(
        isinstance(trainer, str) and TRAINER.fullmatch(trainer) is not None,
        f"{where} comes from the trainer {trainer!r}, which may not train the network "
        "of the plan. Supported are trainers that change only schedule, augmentation, "
        "loss or mirroring, such as nnUNetTrainerNoMirroring.",
    )
    axes = document.get("inference_allowed_mirroring_axes") or ()
    checks.require(
        isinstance(axes, tuple | list) and set(axes) <= {0, 1, 2},
        f"{where} allows mirroring along the axes {axes!r}, but there are 0, 1 and 2.",
    )
    return about["configuration"], tuple(axes)


def network_of(values: Mapping[str, Any], *, channels: int) -> PyramidConfig:
    """Return the config of a plan's network.

    Args:
        values: class and arguments, from `nnunet_plan.Plan.network`.
        channels: of the output.

    Raises:
        UserError: for another network, and arguments that change it.
    """
    name = str(values["class"]).rsplit(".", 1)[-1]
    checks.one_of("the network of the plan", name, NETWORKS)
    cls = NETWORKS[name]
    blocks = BLOCKS[cls is ResidualEncoderUNetConfig]
    for key, value in values.items():
        known = sorted(
            {*FIELDS, blocks, *FIXED, *UNUSED, "norm_op_kwargs", "nonlin_kwargs"}
        )
        checks.one_of(f"an argument of the plan's {name}", key, known)
        checks.require(
            value == FIXED.get(key, value),
            f"{key} of the plan's {name} is {value!r}, but only {FIXED.get(key)!r} is "
            "supported.",
        )
    for group, allowed in (("norm_op_kwargs", NORM), ("nonlin_kwargs", SLOPE)):
        for key, value in (values.get(group) or {}).items():
            checks.one_of(f"a key of the plan's {group}", key, allowed)
            checks.one_of(f"{key} of the plan's {group}", value, allowed[key])
    arguments = {key: values[key] for key in (*FIELDS, blocks) if key in values}
    return cls(in_channels=1, out_channels=channels, **arguments)


def _model(network, document, where):
    """Return the network with the weights of a checkpoint."""
    weights = document.get("network_weights")
    checks.require(
        isinstance(weights, Mapping) and len(weights) > 0,
        f"{where} holds no network_weights; it is not a checkpoint of nnU-Net v2.",
    )
    graphdef, shapes = abstract_model(network)
    model = nnx.merge(
        graphdef, jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), shapes)
    )
    try:
        load_torch(model, weights)
    except checks.UserError as error:
        first = str(error).splitlines()
        raise checks.UserError(
            f"{where} does not fit the network of {nnunet_plan.PLANS}: {first[0]}"
            f"{' ' + first[1].strip() if len(first) > 1 else ''}"
        ) from error
    return model


def permuted(config: PyramidConfig, axes: Sequence[int]) -> PyramidConfig:
    """Return the config of the network whose input has its axes in another order."""
    changed: dict[str, Any] = {
        key: tuple(tuple(triple(v)[a] for a in axes) for v in getattr(config, key))
        for key in ("strides", "kernel_sizes")
    }
    return replace(config, **changed)


def permuted_weights(
    weights: Mapping[str, np.ndarray], axes: Sequence[int]
) -> dict[str, np.ndarray]:
    """Return PyTorch's weights for an input with its axes in another order.

    One array under several names stays one.
    """
    order = (0, 1, *(2 + axis for axis in axes))
    done = {
        id(a): np.ascontiguousarray(a.transpose(order)) if a.ndim == 5 else a
        for a in weights.values()
    }
    return {name: done[id(array)] for name, array in weights.items()}


def axes_of_scan(plan: Plan) -> tuple[int, ...]:
    """Return the network's axis for each axis of a scan: right, front and head."""
    return tuple(plan.transpose.index(2 - axis) for axis in range(3))


def start_of(path: str | Path) -> tuple[dict[str, np.ndarray], tuple[str, ...]]:
    """Return weights and names of outputs to begin a training with.

    They are those of the first fold, for input with the axes of a scan. Regions are no
    classes: sigmoids, which overlap.
    """
    folder = read(path, first=True)
    plan, names = folder.plan, folder.plan.names
    found = permuted_weights(to_torch(folder.models[0]), axes_of_scan(plan))
    if plan.regions:
        return found, tuple(f"region {names[i]}" for i in plan.regions)
    return found, ("background", *names[1:])
