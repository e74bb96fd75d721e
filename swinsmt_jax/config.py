"""Typed, checked configuration of an experiment. Imports no jax.

A config file returns a `ml_collections.ConfigDict`; `from_config_dict` turns it into
the frozen dataclasses below, and nothing beneath the scripts sees anything else.
"""

import dataclasses
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field

from swinsmt_jax import checks
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
        zoom_probability, zoom_range: random enlargement before the crop.
        rotate_probability: rotation by 90, 180 or 270 degrees in the axial plane.
        intensity_probability, intensity_shift: shift of the scaled image by up to
            +-intensity_shift.
        mirror_probability: exchange of right and left, in image and names of classes.
        noise_probability, noise_most: Gaussian noise, its deviation up to noise_most of
            the scaled image.
        blur_probability, blur_sigma: smoothing, its deviation in voxels.
        gamma_probability, gamma_range: power of the scaled image.
        low_resolution_probability, low_resolution_range: coarser grid and back, ratio
            of the grids.
        num_workers: processes that make crops; 0 makes them in threads.
        num_threads: reading threads per process.
        classes: names of the label ids from 1 on; empty for TotalSegmentator v2's. A
            training takes them from its store.
        cache: keep decoded cases in memory (small datasets).
    """

    root: str
    patch_shape: tuple[int, ...]
    batch_size: int
    spacing: float = 0.0
    hu_range: tuple[float, ...] = (-1024.0, 1024.0)
    foreground_ratio: float = 0.5
    zoom_probability: float = 0.3
    zoom_range: tuple[float, ...] = (1.3, 1.5)
    rotate_probability: float = 0.1
    intensity_probability: float = 0.2
    intensity_shift: float = 0.1
    mirror_probability: float = 0.0
    noise_probability: float = 0.0
    noise_most: float = 0.1
    blur_probability: float = 0.0
    blur_sigma: tuple[float, ...] = (0.5, 1.0)
    gamma_probability: float = 0.0
    gamma_range: tuple[float, ...] = (0.7, 1.5)
    low_resolution_probability: float = 0.0
    low_resolution_range: tuple[float, ...] = (0.5, 1.0)
    num_workers: int = 0
    num_threads: int = 2
    classes: tuple[str, ...] = ()
    cache: bool = False

    def __post_init__(self):
        checks.typed_fields("data", self)
        ranges = ("blur_sigma", "gamma_range", "low_resolution_range")
        checks.require(
            len(self.patch_shape) == 3,
            f"data.patch_shape is {self.patch_shape}, but must have 3 sides.",
        )
        for side in self.patch_shape:
            checks.positive(f"a side of data.patch_shape {self.patch_shape}", side)
        checks.positive("data.batch_size", self.batch_size)
        checks.positive("data.num_threads", self.num_threads)
        checks.in_range("data.num_workers", self.num_workers, 0, 1024)
        checks.in_range("data.spacing", self.spacing, 0.0, 100.0)
        for name in ("foreground_ratio", "zoom_probability", "rotate_probability"):
            checks.in_range(f"data.{name}", getattr(self, name), 0.0, 1.0)
        for name in ("intensity", "mirror", "noise", "blur", "gamma", "low_resolution"):
            name = f"{name}_probability"
            checks.in_range(f"data.{name}", getattr(self, name), 0.0, 1.0)
        for name, most in zip(ranges, (100.0, 100.0, 1.0), strict=True):
            low_high = getattr(self, name)
            checks.require(
                len(low_high) == 2 and 0 < low_high[0] <= low_high[1] <= most,
                f"data.{name} is {low_high}, but must be (low, high) with 0 < low <= "
                f"high <= {most:g}.",
            )
        checks.in_range("data.noise_most", self.noise_most, 0.0, 10.0)
        checks.in_range("data.intensity_shift", self.intensity_shift, 0.0, 10.0)
        checks.require(
            len(self.hu_range) == 2 and self.hu_range[0] < self.hu_range[1],
            f"data.hu_range is {self.hu_range}, but must be (low, high), low < high.",
        )
        checks.require(
            len(self.zoom_range) == 2 and 1 <= self.zoom_range[0] <= self.zoom_range[1],
            f"data.zoom_range is {self.zoom_range}, but must be (low, high) with "
            "1 <= low <= high.",
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
    return _build(ExperimentConfig, values, "")


def model_from_dict(values: Mapping) -> NetworkConfig:
    """Build a model config from its fields and the key `name`."""
    return _build_model(_plain(values), "model.")


def to_dict(config: ExperimentConfig | NetworkConfig) -> dict:
    """Return the nested plain dictionary from which the config can be built again."""
    if not isinstance(config, ExperimentConfig):
        return {"name": registry.entry_of(config).name, **dataclasses.asdict(config)}
    return {**dataclasses.asdict(config), "model": to_dict(config.model)}


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
