"""Typed, checked configuration of an experiment. Imports no jax.

A config file returns a `ml_collections.ConfigDict`; `from_config_dict` turns it into
the frozen dataclasses below, and nothing beneath the scripts sees anything else.
"""

import dataclasses
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated

from absl import logging

from swinsmt_jax import checks
from swinsmt_jax.data.augmentation import Augmentations
from swinsmt_jax.models import registry
from swinsmt_jax.models.registry import NetworkConfig


@dataclass(frozen=True)
class DataConfig:
    """Where the scans lie and how crops are taken from them.

    Attributes:
        root: folder in the TotalSegmentator-V2 layout, or a store of preprocess.py.
        patch_shape: training crop (D, H, W) in voxels.
        batch_size: crops per step over all devices and processes.
        spacing: voxel side in mm to which scans are resampled; 0 keeps the scan's own.
        hu_range: (low, high) HU mapped to [0, 1] and clipped.
        foreground_ratio: share of crops centred on a labelled voxel.
        augmentations: what changes the crops; see `data.augmentation`.
        num_workers: processes that make crops; 0 makes them in threads.
        num_threads: reading threads per process.
        classes: names of the label ids from 1 on; empty for TotalSegmentator v2's. A
            training takes them from its store.
        cache: keep decoded cases in memory (small datasets).
    """

    root: str
    patch_shape: checks.Positives
    batch_size: checks.Positive
    spacing: Annotated[float, checks.Within(0.0, 100.0)] = 0.0
    hu_range: tuple[float, ...] = (-1024.0, 1024.0)
    foreground_ratio: checks.Share = 0.5
    augmentations: Augmentations = field(default_factory=Augmentations)
    num_workers: Annotated[int, checks.Within(0, 1024)] = 0
    num_threads: checks.Positive = 2
    classes: tuple[str, ...] = ()
    cache: bool = False

    def __post_init__(self):
        checks.typed_fields("data", self)
        checks.require(
            len(self.patch_shape) == 3,
            f"data.patch_shape is {self.patch_shape}, but must have 3 sides.",
        )
        checks.require(
            len(self.hu_range) == 2 and self.hu_range[0] < self.hu_range[1],
            f"data.hu_range is {self.hu_range}, but must be (low, high), low < high.",
        )


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW with linear warm-up and cosine decay to `final_ratio * learning_rate`.

    Attributes:
        learning_rate: at its highest.
        weight_decay: decoupled, of the kernels alone.
        warmup_steps: steps of the rise.
        final_ratio: of the last learning rate to the highest.
        clip_norm: largest global norm of the gradient.
        b1, b2: decay of the moments.
        freeze: regular expressions; parameters whose path one of them is found in
            ("swinViT/layers1/blocks/0/norm1/scale") keep their value.
        layer_decay: factor of the learning rate for each stage further from the
            decoder, for fine-tuning; 1 has none.
    """

    learning_rate: float
    weight_decay: float = 1e-4
    warmup_steps: int = 0
    final_ratio: float = 0.0
    clip_norm: float = 1.0
    b1: float = 0.9
    b2: float = 0.999
    freeze: tuple[str, ...] = ()
    layer_decay: float = 1.0

    def __post_init__(self):
        checks.typed_fields("optimizer", self)
        for pattern in self.freeze:
            checks.pattern("optimizer.freeze", pattern)
        checks.require(
            0.0 < self.layer_decay <= 1.0,
            f"optimizer.layer_decay is {self.layer_decay}, but must lie in (0, 1].",
        )
        checks.require(
            self.learning_rate > 0,
            f"optimizer.learning_rate is {self.learning_rate}, but must be positive.",
        )
        checks.require(
            self.clip_norm > 0,
            f"optimizer.clip_norm is {self.clip_norm}, but must be positive; "
            "a large value such as 1e9 switches clipping off.",
        )
        checks.in_range("optimizer.weight_decay", self.weight_decay, 0.0, 10.0)
        checks.in_range("optimizer.warmup_steps", self.warmup_steps, 0, 10**9)
        checks.in_range("optimizer.final_ratio", self.final_ratio, 0.0, 1.0)
        for name in ("b1", "b2"):
            checks.in_range(f"optimizer.{name}", getattr(self, name), 0.0, 1.0)


@dataclass(frozen=True)
class TrainingConfig:
    """Length and rhythm of a run, in optimiser steps.

    Attributes:
        num_steps: steps of the run.
        seed: of initialisation, data order and dropout.
        log_every: steps between rows of metrics.
        eval_every: steps between validations; 0 validates at the end alone.
        eval_cases: validation cases used; 0 takes the whole split.
        checkpoint_every: steps between checkpoints; the last step is always kept.
        loss: what is minimised, one of `training.losses.LOSSES`: "dice_ce" or
            "tversky_ce".
        accumulate: parts of a batch whose gradients are averaged one after the other.
        ema_decay: of the running average of the parameters that is then validated and
            evaluated; 0 has none.
        max_skipped: steps in a row that may be left out, because loss or gradient is
            not finite, before the run stops.
    """

    num_steps: int
    seed: int = 0
    log_every: int = 10
    eval_every: int = 0
    eval_cases: int = 0
    checkpoint_every: int = 1000
    loss: str = "dice_ce"
    accumulate: int = 1
    ema_decay: float = 0.0
    max_skipped: int = 10

    def __post_init__(self):
        checks.typed_fields("training", self)
        for name in ("num_steps", "log_every", "checkpoint_every", "accumulate"):
            checks.positive(f"training.{name}", getattr(self, name))
        checks.positive("training.max_skipped", self.max_skipped)
        checks.require(
            0.0 <= self.ema_decay < 1.0,
            f"training.ema_decay is {self.ema_decay}, but must lie in [0, 1); 0 keeps "
            "no average.",
        )
        for name in ("eval_every", "eval_cases", "seed"):
            checks.in_range(f"training.{name}", getattr(self, name), 0, 2**32 - 1)


@dataclass(frozen=True)
class MeshConfig:
    """Device mesh: `data` x `expert` devices; `data = -1` takes what is left."""

    data: int = -1
    expert: int = 1

    def __post_init__(self):
        checks.typed_fields("mesh", self)
        checks.positive("mesh.expert", self.expert)
        checks.require(
            self.data == -1 or self.data >= 1,
            f"mesh.data is {self.data}, but must be at least 1, or -1 for the rest.",
        )


@dataclass(frozen=True)
class InferenceConfig:
    """Sliding window over a whole scan; the window is the training patch.

    Attributes:
        overlap: share of the window that neighbours have in common.
        blend: "gaussian" or "constant" weights of a window's voxels.
        window_batch: windows per call of the network, over all devices.
        accumulate: where the windows' logits are averaged: in the memory of the "host"
            or of the "device"; "auto" takes an accelerator that has room for them.
    """

    overlap: float = 0.5
    blend: str = "gaussian"
    window_batch: int = 1
    accumulate: str = "auto"

    def __post_init__(self):
        checks.typed_fields("inference", self)
        checks.require(
            0.0 <= self.overlap < 1.0,
            f"inference.overlap is {self.overlap}, but must lie in [0, 1).",
        )
        checks.one_of("inference.blend", self.blend, ("gaussian", "constant"))
        places = ("auto", "host", "device")
        checks.one_of("inference.accumulate", self.accumulate, places)
        checks.positive("inference.window_batch", self.window_batch)


@dataclass(frozen=True)
class ExperimentConfig:
    """Everything that decides a run."""

    model: NetworkConfig
    data: DataConfig
    optimizer: OptimizerConfig
    training: TrainingConfig
    mesh: MeshConfig = field(default_factory=MeshConfig)
    inference: InferenceConfig = field(default_factory=InferenceConfig)

    def __post_init__(self):
        self.model.check_patch("data.patch_shape", self.data.patch_shape)
        checks.require(
            self.model.in_channels == 1,
            f"model.in_channels is {self.model.in_channels}, but a CT has 1 channel.",
        )
        checks.require(
            self.optimizer.warmup_steps <= self.training.num_steps,
            f"optimizer.warmup_steps is {self.optimizer.warmup_steps}, but the run has "
            f"only training.num_steps = {self.training.num_steps}.",
        )


def from_config_dict(config: Mapping) -> ExperimentConfig:
    """Build the checked dataclasses from a (nested) mapping such as a ConfigDict.

    `config["model"]["name"]` is one of `registry.names()`; all other keys are the
    fields of the dataclasses.

    Raises:
        UserError: for an unknown or missing key, a value of the wrong type or out of
            range; the message names the dotted key.
    """
    values = _plain(config)
    if isinstance(values, dict) and isinstance(values.get("data"), dict):
        values["data"] = _with_new_keys(values["data"])
    return _build(ExperimentConfig, values, "")


def model_from_dict(values: Mapping) -> NetworkConfig:
    """Build a model config from its fields and the key `name`."""
    return _build_model(_plain(values), "model.")


def to_dict(config: ExperimentConfig | NetworkConfig) -> dict:
    """Return the nested plain dictionary from which the config can be built again."""
    if not isinstance(config, ExperimentConfig):
        return {"name": registry.entry_of(config).name, **dataclasses.asdict(config)}
    return {**dataclasses.asdict(config), "model": to_dict(config.model)}


_RENAMED = {  # keys of data in configs of before -> keys of data.augmentations
    "zoom_probability": "zoom.probability",
    "zoom_range": "zoom.factor",
    "rotate_probability": "rotate.probability",
    "intensity_probability": "intensity.probability",
    "intensity_shift": "intensity.shift",
    "mirror_probability": "mirror.probability",
    "noise_probability": "noise.probability",
    "noise_most": "noise.std_max",
    "blur_probability": "blur.probability",
    "blur_sigma": "blur.sigma",
    "gamma_probability": "gamma.probability",
    "gamma_range": "gamma.exponent",
    "low_resolution_probability": "low_resolution.probability",
    "low_resolution_range": "low_resolution.scale",
}


def _with_new_keys(data: dict) -> dict:
    """Return the group `data` with its old keys renamed; they win over new ones.

    A config file has new keys, so an old one beside them comes from a flag.
    """
    old = [key for key in _RENAMED if key in data]
    if not old:
        return data
    told = ", ".join(f"{key} is now augmentations.{_RENAMED[key]}" for key in old)
    logging.info("keys of the config's group data have new names: %s", told)
    new = dict(data)
    new["augmentations"] = {
        k: dict(v) for k, v in data.get("augmentations", {}).items()
    }
    for key in old:
        name, parameter = _RENAMED[key].split(".")
        new["augmentations"].setdefault(name, {})[parameter] = new.pop(key)
    return new


def _plain(value):
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if hasattr(value, "to_dict"):
        return _plain(value.to_dict())
    return tuple(value) if isinstance(value, list) else value


def _build_model(values: dict, prefix: str) -> NetworkConfig:
    values = dict(values)
    name = values.pop("name", None)
    return _build(registry.config_class(name), values, prefix)


def _build(cls: type, values: dict, prefix: str):
    fields = {f.name: f for f in dataclasses.fields(cls)}
    hints = typing.get_type_hints(cls)
    for key in values:
        checks.require(
            key in fields,
            f"unknown config key {prefix}{key}; the keys here are "
            f"{', '.join(fields)}.{checks.did_you_mean(key, fields)}",
        )
    arguments = {}
    for name, spec in fields.items():
        if name not in values:
            has_default = (
                spec.default is not dataclasses.MISSING
                or spec.default_factory is not dataclasses.MISSING
            )
            checks.require(has_default, f"config key {prefix}{name} is missing.")
            continue
        arguments[name] = _convert(hints[name], values[name], f"{prefix}{name}")
    return cls(**arguments)


def _convert(hint, value, name: str):
    if hint is NetworkConfig:
        return _build_model(value, f"{name}.")
    if dataclasses.is_dataclass(hint):
        checks.require(
            isinstance(value, Mapping), f"config key {name} must be a group of keys."
        )
        return _build(hint, value, f"{name}.")
    return value  # its type is checked with the dataclass
