"""Typed, checked configuration of an experiment. Imports no jax.

A config file returns a `ml_collections.ConfigDict`; `from_config_dict` turns it into
the frozen dataclasses below. Code below the scripts sees nothing else.
"""

import copy
import dataclasses
import functools
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any

from absl import logging

from swinsmt_jax import checks
from swinsmt_jax.checks import Among, Positive, Positives, Rule, Share, Within
from swinsmt_jax.class_map import V2
from swinsmt_jax.data.augmentation import Augmentations
from swinsmt_jax.data.spacing import Spacing, plain
from swinsmt_jax.models import registry
from swinsmt_jax.models.registry import NetworkConfig
from swinsmt_jax.runtime.files import absolute

Count = Annotated[int, Within(0, 2**32 - 1)]


@dataclass(frozen=True)
class Seen:
    """What a network saw of its data, for those who use it later.

    A training takes it from its data, whatever a config says.

    Attributes:
        fingerprint: hash of the training cases.
        least, most: smallest and largest sides in mm of the voxels of the training
            cases, to the right, front and head, where each kept its own.
        groups: class names by group, the columns of the results.
        usual_ml: {class: 1st and 99th percentile of its volume in ml} of the training
            cases, where their number tells them.
    """

    fingerprint: str = ""
    least: tuple[float, ...] = ()
    most: tuple[float, ...] = ()
    groups: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    usual_ml: Mapping[str, tuple[float, ...]] = field(default_factory=dict)

    def __post_init__(self):
        checks.typed_fields("data.seen", self)


@dataclass(frozen=True)
class DataConfig:
    """Where the scans lie and how crops are taken from them.

    Attributes:
        root: folder of a dataset, or a store of preprocess.py.
        patch_shape: training crop (D, H, W) in voxels.
        batch_size: crops per step over all devices and processes; 0 where
            `batch_per_device` says how many.
        spacing: voxel side in mm to which scans are resampled, or three sides, to the
            right, front and head; 0 keeps the scan's own. A training on a store takes
            the store's, and refuses another one than 0.
        orientation: of the axes of what the network sees.
        hu_range: (low, high) HU, to which scans are clipped; they are mapped to [0, 1].
        normalization: (mean, standard deviation) in HU, by which clipped HU are
            normalised instead, as in nnU-Net.
        modality: of scans that are read; only a CT is checked for values unlike HU.
        foreground_ratio: share of crops centred on a labelled voxel.
        augmentations: what changes the crops; see `data.augmentation`.
        num_workers: processes that make crops; 0 makes them in threads.
        num_threads: reading threads per process.
        classes: names of the label ids from 1 on; empty for TotalSegmentator v2's. A
            training takes them from its store.
        cache: keep decoded cases in memory (small datasets).
        description: JSON file that describes a dataset in `root`, if not its own.
        fold: of a cross-validation, from 0 on; -1 takes the splits of the data.
        seen: of the training; not for users to set.
        batch_per_device: crops per step on each device, instead of `batch_size`.
    """

    root: str
    patch_shape: Annotated[
        Positives, Rule("have 3 sides", lambda sides: len(sides) == 3)
    ]
    batch_size: Count = 0
    spacing: Spacing = 0.0
    orientation: Annotated[str, Among(("RAS",))] = "RAS"
    hu_range: Annotated[
        tuple[float, ...],
        Rule("be (low, high), low < high", lambda hu: len(hu) == 2 and hu[0] < hu[1]),
    ] = (-1024.0, 1024.0)
    normalization: Annotated[
        tuple[float, ...],
        Rule(
            "be (mean, standard deviation), or empty",
            lambda of: not of or (len(of) == 2 and of[1] > 0),
        ),
    ] = ()
    modality: str = "CT"
    foreground_ratio: Share = 0.5
    augmentations: Augmentations = field(default_factory=Augmentations)
    num_workers: Annotated[int, Within(0, 1024)] = 0
    num_threads: Positive = 2
    classes: tuple[Annotated[str, checks.file_name], ...] = ()
    cache: bool = False
    description: str = ""
    fold: Annotated[int, Within(-1, 100)] = -1
    seen: Seen = field(default_factory=Seen)
    batch_per_device: Count = 0

    def __post_init__(self):
        checks.typed_fields("data", self)
        checks.require(
            (self.batch_size > 0) != (self.batch_per_device > 0),
            f"data.batch_size is {self.batch_size} and data.batch_per_device "
            f"{self.batch_per_device}, but exactly one of them must be above 0: crops "
            "per step over all devices, or on each.",
        )
        object.__setattr__(self, "spacing", plain(self.spacing))
        if self.root.startswith("~"):
            object.__setattr__(self, "root", str(absolute(self.root)))

    def on_devices(self, devices: int) -> "DataConfig":
        """Return the config with the batch size over so many devices."""
        if not self.batch_per_device:
            return self
        size = self.batch_per_device * devices
        return dataclasses.replace(self, batch_size=size, batch_per_device=0)

    @property
    def class_names(self) -> tuple[str, ...]:
        """Names of the label ids, the background first."""
        return (V2.names[0], *self.classes) if self.classes else V2.names


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
        extend: what the schedule does when a run is continued with more steps: it is
            "stretch"ed over all of them, so that the rate rises again; stays "constant"
            at its last rate; or begins again, "restart".
        spans: steps at which earlier lengths of an extended run ended; not for users.
    """

    learning_rate: Annotated[float, Rule("be positive", lambda rate: rate > 0)]
    weight_decay: Annotated[float, Within(0.0, 10.0)] = 1e-4
    warmup_steps: Annotated[int, Within(0, 10**9)] = 0
    final_ratio: Share = 0.0
    clip_norm: Annotated[
        float,
        Rule(
            "be positive; a large value such as 1e9 switches clipping off",
            lambda norm: norm > 0,
        ),
    ] = 1.0
    b1: Share = 0.9
    b2: Share = 0.999
    freeze: tuple[Annotated[str, checks.pattern], ...] = ()
    layer_decay: Annotated[
        float, Rule("lie in (0, 1]", lambda factor: 0 < factor <= 1)
    ] = 1.0
    extend: Annotated[str, Among(("stretch", "constant", "restart"))] = "stretch"
    spans: tuple[int, ...] = ()

    def __post_init__(self):
        checks.typed_fields("optimizer", self)


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
        loss: what is minimised, one of `training.losses.LOSSES`: "dice_ce",
            "tversky_ce" or "one_vs_all".
        accumulate: parts of a batch whose gradients are averaged one after the other.
        ema_decay: of the running average of the parameters that is then validated and
            evaluated; 0 has none.
        max_skipped: steps in a row that may be left out, because loss or gradient is
            not finite, before the run stops.
        deterministic: on a GPU, run only kernels that add up in the same order each
            time, which takes longer; elsewhere all are.
    """

    num_steps: Positive
    seed: Count = 0
    log_every: Positive = 10
    eval_every: Count = 0
    eval_cases: Count = 0
    checkpoint_every: Positive = 1000
    loss: str = "dice_ce"
    accumulate: Positive = 1
    ema_decay: Annotated[
        float,
        Rule("lie in [0, 1); 0 keeps no average", lambda decay: 0 <= decay < 1),
    ] = 0.0
    max_skipped: Positive = 10
    deterministic: bool = False

    def __post_init__(self):
        checks.typed_fields("training", self)


@dataclass(frozen=True)
class MeshConfig:
    """Device mesh: `data` x `expert` devices; `data = -1` takes what is left."""

    data: Annotated[
        int,
        Rule("be at least 1, or -1 for the rest", lambda n: n == -1 or n > 0),
    ] = -1
    expert: Positive = 1

    def __post_init__(self):
        checks.typed_fields("mesh", self)


@dataclass(frozen=True)
class InferenceConfig:
    """Sliding window over a whole scan; the window is the training patch.

    Attributes:
        overlap: share of the window that neighbours have in common.
        blend: "gaussian" or "constant" weights of a window's voxels.
        convention: where windows lie, and whose Gaussian: "monai" or "nnunet".
        window_batch: windows per call of the network, over all devices.
        accumulate_on: where the windows' logits are averaged: in the memory of the
            "host" or the "device"; "auto" takes an accelerator that has room for them.
    """

    overlap: Annotated[float, Rule("lie in [0, 1)", lambda share: 0 <= share < 1)] = 0.5
    blend: Annotated[str, Among(("gaussian", "constant"))] = "gaussian"
    convention: Annotated[str, Among(("monai", "nnunet"))] = "monai"
    window_batch: Positive = 1
    accumulate_on: Annotated[str, Among(("auto", "host", "device"))] = "auto"

    def __post_init__(self):
        checks.typed_fields("inference", self)


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
        model, optimizer, training = self.model, self.optimizer, self.training
        checks.require(
            model.in_channels == 1,
            f"model.in_channels is {model.in_channels}, but a CT has 1 channel.",
        )
        model.check_patch("data.patch_shape", self.data.patch_shape)
        checks.require(
            optimizer.warmup_steps <= training.num_steps,
            f"optimizer.warmup_steps is {optimizer.warmup_steps}, but the run has only "
            f"training.num_steps = {training.num_steps}.",
        )
        checks.require(
            optimizer.layer_decay == 1 or bool(model.encoder_stages),
            f"optimizer.layer_decay is {optimizer.layer_decay}, but this network has "
            "no encoder stages that it could act on; leave it at 1.",
        )
        each = self.data.batch_per_device
        checks.divides(
            "training.accumulate",
            training.accumulate,
            of="data.batch_per_device" if each else "data.batch_size",
            number=each or self.data.batch_size,
        )
        checks.divides(  # without experts any mesh will do
            "mesh.expert",
            self.mesh.expert,
            of="model.num_experts",
            number=model.num_experts,
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
    for group in _RENAMED if isinstance(values, dict) else ():
        if isinstance(values.get(group), dict):
            values[group] = with_new_keys(group, values[group])
    return _build(ExperimentConfig, values, "")


def model_from_dict(values: Mapping) -> NetworkConfig:
    """Build a model config from its fields and the key `name`."""
    return _build(NetworkConfig, _plain(values), "model")


def to_dict(config: ExperimentConfig | NetworkConfig) -> dict:
    """Return the nested plain dictionary from which the config can be built again."""
    if not isinstance(config, ExperimentConfig):
        return {"name": registry.entry_of(config).name, **dataclasses.asdict(config)}
    return {**dataclasses.asdict(config), "model": to_dict(config.model)}


_RENAMED = {  # by group: keys of earlier versions -> today's
    "data": {
        "zoom_probability": "augmentations.zoom.probability",
        "zoom_range": "augmentations.zoom.factor",
        "rotate_probability": "augmentations.rotate.probability",
        "intensity_probability": "augmentations.intensity.probability",
        "intensity_shift": "augmentations.intensity.shift",
        "mirror_probability": "augmentations.mirror.probability",
        "noise_probability": "augmentations.noise.probability",
        "noise_most": "augmentations.noise.std_max",
        "blur_probability": "augmentations.blur.probability",
        "blur_sigma": "augmentations.blur.sigma",
        "gamma_probability": "augmentations.gamma.probability",
        "gamma_range": "augmentations.gamma.exponent",
        "low_resolution_probability": "augmentations.low_resolution.probability",
        "low_resolution_range": "augmentations.low_resolution.scale",
    },
    "inference": {"accumulate": "accumulate_on"},
}


def with_new_keys(group: str, values: dict) -> dict:
    """Return a group of the config with its old keys renamed; they win over new ones.

    A config file has new keys, so an old one beside them comes from a flag.
    """
    renamed = _RENAMED.get(group, {})
    old = [key for key in renamed if key in values]
    if not old:
        return values
    told = ", ".join(f"{key} is now {renamed[key]}" for key in old)
    logging.info("keys of the config's group %s have new names: %s", group, told)
    new = copy.deepcopy(values)
    for key in old:
        *groups, name = renamed[key].split(".")
        place = functools.reduce(lambda at, part: at.setdefault(part, {}), groups, new)
        place[name] = new.pop(key)
    return new


def _plain(value):
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if hasattr(value, "to_dict"):
        return _plain(value.to_dict())
    return tuple(value) if isinstance(value, list) else value


def _build(cls: Any, group: Any, key: str) -> Any:
    """Build the dataclass of a group of keys; the whole config has the key ""."""
    checks.require(
        isinstance(group, Mapping), f"config key {key} must be a group of keys."
    )
    values, prefix = dict(group), key and f"{key}."
    known: list[str] = []
    if cls is NetworkConfig:
        cls, known = registry.config_class(values.pop("name", None)), ["name"]
    fields = {spec.name: spec for spec in dataclasses.fields(cls)}
    known += fields
    for name in values:
        checks.require(
            name in fields,
            f"unknown config key {prefix}{name}; the keys here are "
            f"{', '.join(known)}.{checks.did_you_mean(name, known)}",
        )
    for name, spec in fields.items():
        needed = spec.default is spec.default_factory is dataclasses.MISSING
        checks.require(
            name in values or not needed, f"config key {prefix}{name} is missing."
        )
    hints = typing.get_type_hints(cls)
    for name, value in values.items():  # types are checked with the dataclass
        if dataclasses.is_dataclass(hints[name]):
            values[name] = _build(hints[name], value, prefix + name)
    return cls(**values)
