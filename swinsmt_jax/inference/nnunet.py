"""Segment scans with a model folder of nnU-Net v2, following its predictor.

from swinsmt_jax import load_nnunet, save
segmenter = load_nnunet("Dataset001_X/nnUNetTrainer__nnUNetPlans__3d_fullres")
labels = segmenter.segment("scan.nii.gz")         # uint8, in the axes of the file
"""

import dataclasses
import functools
import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from swinsmt_jax.config import (
    DataConfig,
    ExperimentConfig,
    InferenceConfig,
    OptimizerConfig,
    TrainingConfig,
)
from swinsmt_jax.convert import nnunet_folder
from swinsmt_jax.convert.nnunet_folder import ModelFolder
from swinsmt_jax.data.network_view import NetworkView
from swinsmt_jax.data.nnunet_plan import Plan
from swinsmt_jax.data.nnunet_view import nnunet_view
from swinsmt_jax.data.sample import Sample
from swinsmt_jax.data.volume import Volume, spacing_of
from swinsmt_jax.inference.grid import Decision
from swinsmt_jax.inference.provenance import digest_of_network
from swinsmt_jax.inference.segmenter import (
    Segmenter,
    accepting_sums,
    computing_in,
    with_options,
)
from swinsmt_jax.inference.sliding_window import Predict
from swinsmt_jax.labels import names_by_id
from swinsmt_jax.models import split


@dataclasses.dataclass(frozen=True, kw_only=True)
class NNUNetSegmenter(Segmenter):
    """A model folder of nnU-Net; made by `load_nnunet`.

    Attributes:
        plan: how the model sees scans.
        folds: of the folder; their logits are averaged.
    """

    plan: Plan
    folds: tuple[str, ...]

    whole = False

    @property
    def decision(self) -> Decision:
        """How logits become labels."""
        return Decision("logits", self.plan.regions)

    @property
    def class_names(self) -> dict[int, str]:
        """Names of the network's label ids, without the background."""
        names = self.plan.names
        return names_by_id(names, num_classes=len(names))

    @property
    def made_by(self) -> dict[str, object]:
        """Everything that decides a scan's labels, for the record."""
        spacing = list(self.plan.spacing)
        return super().made_by | {"folds": list(self.folds), "spacing": spacing}

    def view_of(self, sample: Sample) -> NetworkView:
        """Return the network's view of a case from a dataset or a store."""
        source = sample.source_affine  # a store has RAS orientation
        return nnunet_view(
            sample.image,
            spacing=np.array(spacing_of(sample.affine), np.float32).tolist(),
            source_affine=sample.affine if source is None else source,
            plan=self.plan,
        )

    def view(self, volume: Volume) -> NetworkView:
        """Return the network's view of a scan in RAS orientation."""
        return nnunet_view(
            volume.array,
            spacing=volume.sides,
            source_affine=volume.source_affine,
            plan=self.plan,
        )


@accepting_sums
def load_nnunet(
    folder: str | Path,
    *,
    folds: Sequence[str] = (),
    mirror: bool = True,
    accum_dtype: str = "float32",
    dtype: str | None = None,
    **inference: Any,
) -> NNUNetSegmenter:
    """Load a model folder of nnU-Net v2: plans.json, dataset.json and its checkpoints.

    Args:
        folder: written by nnU-Net, Trainer__Plans__Configuration.
        folds: numbers, or "all"; none takes all that exist.
        mirror: average over mirror images along the axes that the checkpoint allows.
        accum_dtype: "float16" halves the memory of the logits that are kept.
        dtype: "bfloat16" or "float32", of matrix products and convolutions.
        inference: fields of `config.InferenceConfig` to change, such as overlap=0.25.

    Raises:
        UserError: as `nnunet_folder.read`, and for fields out of range.
    """
    read = nnunet_folder.read(folder, folds=folds)
    config, models = experiment(read), []
    for model in read.models:
        network, model = computing_in(dtype, config.model, model)
        models.append(model)
    windows = with_options(config.inference, inference)
    config = dataclasses.replace(config, model=network, inference=windows)
    axes = read.mirror_axes if mirror else ()
    return NNUNetSegmenter(
        config,
        averaging(models, axes=axes),
        step=0,
        accum_dtype=accum_dtype,
        network=digest_of_network([split(model)[1] for model in models]),
        mirror=bool(axes),
        plan=read.plan,
        folds=read.folds,
    )


def experiment(folder: ModelFolder) -> ExperimentConfig:
    """Return a model folder as the config of an experiment, in the network's axes."""
    plan = folder.plan
    rule = plan.normalization
    data = DataConfig(
        root="",
        patch_shape=plan.patch_shape,
        batch_size=plan.batch_size,
        hu_range=(rule.low, rule.high) if rule.low < rule.high else (-1024.0, 1024.0),
        modality=plan.modality,
        classes=plan.names[1:],
    )
    return ExperimentConfig(
        model=folder.network,
        data=data,
        optimizer=OptimizerConfig(learning_rate=1e-3),
        training=TrainingConfig(num_steps=1),
        inference=InferenceConfig(convention="nnunet"),
    )


def averaging(models: Sequence[nnx.Module], *, axes: Sequence[int]) -> Predict:
    """Return the function from windows to logits averaged over networks and mirrors.

    Args:
        models: of one config.
        axes: of the windows [D, H, W]; windows are mirrored along every subset.
    """
    subsets = np.array([*itertools.product((False, True), repeat=len(axes))], bool)
    flips = np.zeros((len(subsets), 3), bool)
    flips[:, list(axes)] = subsets.reshape(len(subsets), len(axes))
    passes = [(model, flip) for model in models for flip in flips]

    def predict(windows: jax.Array) -> jax.Array:
        (model, flip), *rest = passes
        if not rest:
            return _apply(model, windows)
        total = _apply_flipped(model, windows, flip)
        for model, flip in rest:
            total = _add(total, _apply_flipped(model, windows, flip))
        return total / len(passes)

    return predict


@jax.jit
def _apply(model, windows):
    return model(windows)


@jax.jit
def _apply_flipped(model, windows, flip):
    """Return logits of mirrored windows, mirrored back; one program for all axes."""

    def flipped(array: jax.Array) -> jax.Array:
        for axis in range(3):
            array = jnp.where(flip[axis], jnp.flip(array, axis + 1), array)
        return array

    return flipped(model(flipped(windows)))


@functools.partial(jax.jit, donate_argnums=0)
def _add(total, logits):
    return total + logits
