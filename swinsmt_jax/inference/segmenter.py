"""Segment scans with a trained network: files or arrays in, labels on their grid out.

from swinsmt_jax import load, save
segmenter = load("runs/x")
labels = segmenter.segment("scan.nii.gz")         # uint8, in the axes of the file
labels = segmenter.segment_array(hu, affine)      # hu [X, Y, Z], in any axes
save("labels.nii.gz", labels, like="scan.nii.gz")
"""

import dataclasses
from collections.abc import Callable
from pathlib import Path

import numpy as np

from swinsmt_jax import checks
from swinsmt_jax.config import ExperimentConfig
from swinsmt_jax.data import dicom, label_table, nifti, pipeline
from swinsmt_jax.data.network_view import network_view
from swinsmt_jax.data.nifti import Volume
from swinsmt_jax.inference.segment import (
    batch_sharding,
    computing_in,
    left_right_swap,
    predict_fn,
    segment,
)
from swinsmt_jax.inference.sliding_window import Predict
from swinsmt_jax.labels import names_by_id
from swinsmt_jax.training.checkpoint import load_model

Progress = Callable[[int, int], None]


@dataclasses.dataclass(frozen=True)
class Segmenter:
    """A trained network and how it sees scans; made by `load`.

    Attributes:
        config: of the experiment; `data` says spacing and HU, `inference` the windows.
        predict: a jitted function from windows to logits.
        step: of the checkpoint.
        sums: "float32" or "float16", of the logits that are kept.
    """

    config: ExperimentConfig
    predict: Predict
    step: int
    sums: str = "float32"

    @property
    def class_names(self) -> dict[int, str]:
        """Names of the label ids that the network gives, background left out."""
        names = pipeline.class_names(self.config.data)
        return names_by_id(names, num_classes=self.config.model.out_channels)

    def segment(
        self, path: str | Path, *, progress: Progress | None = None
    ) -> np.ndarray:
        """Return the labels of a NIfTI file, uint8, in the axes of the file.

        Of a folder with a DICOM series: columns, rows and slices.

        Raises:
            UserError: as `load_scan`.
        """
        volume = load_scan(path)
        return nifti.in_file_axes(
            self.segment_volume(volume, progress=progress), volume
        )

    def segment_array(
        self, hu: np.ndarray, affine: np.ndarray, *, progress: Progress | None = None
    ) -> np.ndarray:
        """Return the labels of a CT, uint8, on its grid.

        Args:
            hu: [X, Y, Z] Hounsfield units, its axes in any order and direction.
            affine: [4, 4], voxel indices to millimetres to the right, front and head.
            progress: as in `predict_labels`.

        Raises:
            UserError: for arrays that are not 3-D or not finite, and an affine that
                cannot be inverted.
        """
        volume = nifti.from_array(hu, affine)
        return nifti.in_file_axes(
            self.segment_volume(volume, progress=progress), volume
        )

    def segment_volume(
        self, volume: Volume, *, progress: Progress | None = None
    ) -> np.ndarray:
        """Return the labels of a CT in RAS orientation, uint8 [X, Y, Z]."""
        data = self.config.data
        view = network_view(
            volume.array, volume.affine, spacing=data.spacing, hu_range=data.hu_range
        )
        return segment(
            self.predict,
            view,
            window=data.patch_shape,
            num_classes=self.config.model.out_channels,
            inference=self.config.inference,
            sharding=batch_sharding(),
            sums=self.sums,
            progress=progress,
        )


def load_scan(path: str | Path) -> Volume:
    """Read a CT: a NIfTI file, or a folder with a DICOM series.

    Raises:
        UserError: as `nifti.load_ct` and `dicom.load_series`.
    """
    return dicom.load_series(path) if Path(path).is_dir() else nifti.load_ct(path)


def load(
    workdir: str | Path,
    *,
    step: int | str | None = None,
    sums: str = "float32",
    mirror: bool = False,
    dtype: str | None = None,
    **inference,
) -> Segmenter:
    """Load the network of a training run.

    Args:
        workdir: of the run.
        step: a number, "latest" or "best"; None takes the best, or else the latest.
        sums: "float16" halves the memory of the logits that are kept.
        mirror: also segment every window with right and left exchanged, and average;
            twice the time.
        dtype: "bfloat16" or "float32", of matrix products and convolutions; None takes
            that of the training.
        inference: fields of `config.InferenceConfig` to change, such as overlap=0.25.

    Raises:
        UserError: as `checkpoint.load_model`, and for fields out of range.
    """
    config, model, info = load_model(workdir, step=step)
    network, model = computing_in(dtype, config.model, model)
    known = {field.name for field in dataclasses.fields(config.inference)}
    for name in inference:
        checks.one_of("an option of the inference", name, known)
    windows = dataclasses.replace(config.inference, **inference)
    config = dataclasses.replace(config, model=network, inference=windows)
    exchanged = None
    if mirror:
        names = pipeline.class_names(config.data)
        exchanged = left_right_swap(names, num_classes=network.out_channels)
    predict = predict_fn(model, exchanged=exchanged)
    return Segmenter(config, predict, info["step"], sums)


def save(
    path: str | Path, labels: np.ndarray, *, like: str | Path, names: dict | None = None
) -> None:
    """Write labels in the axes of a scan with its affine, as NIfTI.

    Args:
        path: .nii.gz or .nii; appears when complete.
        labels: uint8, from `Segmenter.segment(like)`.
        like: the scan, a NIfTI file or a folder with a DICOM series.
        names: {label id: name} for the header, as `Segmenter.class_names`.
    """
    if Path(like).is_dir():
        volume = dicom.load_series(like)
        affine, shape = volume.source_affine, volume.source_shape
    else:
        affine, shape = nifti.grid_of(like)
    checks.require(
        labels.shape == shape,
        f"labels for {path} have shape {labels.shape}, but {like} has {shape}.",
    )
    description = label_table.xml(names) if names else ""
    nifti.write(path, labels, affine, description=description)
