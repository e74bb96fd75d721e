"""The interface of every segmenter: files or arrays in, labels out."""

import abc
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Protocol

import numpy as np

from swinsmt_jax import checks
from swinsmt_jax.inference.grid import Decided
from swinsmt_jax.runtime.files import absolute

if TYPE_CHECKING:
    from swinsmt_jax.data.volume import Volume

Progress = Callable[[int, int], None]


class Scans(Protocol):
    """A segmenter of scans, from files or arrays."""

    whole: ClassVar[bool] = True  # whether voxels are rounded to whole HU

    @property
    def modality(self) -> str:
        """Modality of the scans, for notes on their values."""

    @property
    def class_names(self) -> dict[int, str]:
        """Names of the label ids, without the background."""

    @property
    def made_by(self) -> dict[str, object]:
        """Everything that decides a scan's labels, for the record."""

    @property
    def usual_ml(self) -> Mapping[str, tuple[float, ...]]:
        """Usual volumes of classes, as in `config.Seen`; {} if unknown."""
        return {}

    def segment_volume(
        self, volume: "Volume", *, progress: Progress | None = None
    ) -> np.ndarray:
        """Return the labels of a CT in RAS orientation, uint8 [X, Y, Z]."""
        return self.decide_volume(volume, progress=progress).labels

    @abc.abstractmethod
    def decide_volume(
        self,
        volume: "Volume",
        *,
        confidence: bool = False,
        chosen: Sequence[int] = (),
        progress: Progress | None = None,
    ) -> Decided:
        """Return the labels of a CT in RAS orientation, and facts about them.

        Args:
            volume: the scan.
            confidence: keep each label's probability, and whether it was close.
            chosen: label ids whose probabilities to keep.
            progress: as in `sliding_window.decide`.
        """

    def read(self, path: str | Path) -> "Volume":
        """Read a scan for the network; raises as `load_scan`."""
        return load_scan(path, modality=self.modality, whole=self.whole)

    def segment(
        self, path: str | Path, *, progress: Progress | None = None
    ) -> np.ndarray:
        """Return the labels of a NIfTI file, uint8, in the axes of the file.

        For a folder with a DICOM series: columns, rows and slices.

        Raises:
            UserError: as `load_scan`.
        """
        from swinsmt_jax.data import nifti

        volume = self.read(path)
        with checks.named(path):
            labels = self.segment_volume(volume, progress=progress)
        return nifti.in_file_axes(labels, volume)

    def segment_array(
        self, hu: np.ndarray, affine: np.ndarray, *, progress: Progress | None = None
    ) -> np.ndarray:
        """Return the labels of a CT, uint8, on its grid.

        Args:
            hu: [X, Y, Z] Hounsfield units, its axes in any order and direction.
            affine: [4, 4], voxel indices to millimetres to the right, front and head.
            progress: as in `sliding_window.decide`.

        Raises:
            UserError: for arrays that are not 3-D or not finite, and an affine that
                cannot be inverted.
        """
        from swinsmt_jax.data import nifti

        volume = nifti.from_array(hu, affine, modality=self.modality, whole=self.whole)
        labels = self.segment_volume(volume, progress=progress)
        return nifti.in_file_axes(labels, volume)


def load_scan(
    path: str | Path, *, modality: str = "CT", whole: bool = True
) -> "Volume":
    """Read a CT: a NIfTI file, or a folder with a DICOM series, or folder#UID.

    Voxels are rounded to int16; if `whole` is false they are as in `nifti.load_ct`.

    Raises:
        UserError: as `nifti.load_ct` and `dicom.load_series`.
    """
    from swinsmt_jax.data import dicom, dicom_files, nifti

    path = absolute(path)
    if dicom_files.is_dicom(path):
        return dicom.load_series(path)
    return nifti.load_ct(path, modality=modality, whole=whole)
