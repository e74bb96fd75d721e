"""Segment scans with the weights of TotalSegmentator v2 for its task `total`.

from swinsmt_jax import load_totalsegmentator
segmenter = load_totalsegmentator("~/.totalsegmentator/nnunet/results")
labels = segmenter.segment("scan.nii.gz")         # uint8, ids of labels.CLASS_NAMES

This module follows the rules of TotalSegmentator 2.18.0 around its nnU-Net models. The
scan is resampled linearly to a grid with the same first and last voxels. The models run
one after the other, without mirroring and in steps of 0.8 windows, and their classes
are merged. Labels return by the nearest voxel.
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from absl import logging
from scipy import ndimage

from swinsmt_jax import checks
from swinsmt_jax.convert import nnunet_folder
from swinsmt_jax.data.volume import Volume
from swinsmt_jax.inference.grid import Decided, Decision
from swinsmt_jax.inference.nnunet import load_nnunet
from swinsmt_jax.inference.scan_reader import Progress, Scans
from swinsmt_jax.inference.segmenter import accepting_sums
from swinsmt_jax.labels import CLASS_IDS, CLASS_NAMES, GROUPS, names_by_id
from swinsmt_jax.runtime.files import absolute

HOME = "~/.totalsegmentator/nnunet/results"
TASKS = {  # side of the voxels in mm: {number of the dataset: classes, in order}
    1.5: {
        291: GROUPS["organs"],
        292: GROUPS["vertebrae"],
        293: GROUPS["vessels"],  # and the heart
        294: GROUPS["muscles"],
        295: GROUPS["ribs"],
    },
    3.0: {297: tuple(range(1, len(CLASS_NAMES)))},
}
OVERLAP = 0.2


@dataclasses.dataclass(frozen=True)
class Part:
    """One of the models.

    Attributes:
        folder: of nnU-Net.
        ids: uint8, from its label ids to those of TotalSegmentator v2.
        options: of `load_nnunet`.
        made_by: everything that decides its labels.
    """

    folder: Path
    ids: np.ndarray
    options: dict
    made_by: dict


@dataclasses.dataclass(frozen=True)
class TotalSegmentator(Scans):
    """The models of the task `total`; made by `load_totalsegmentator`.

    Attributes:
        parts: in the order of merging.
        spacing: side in mm of the voxels that they see.
    """

    parts: Sequence[Part]
    spacing: float

    whole = False

    @property
    def modality(self) -> str:
        """Modality of the scans."""
        return "CT"

    @property
    def class_names(self) -> dict[int, str]:
        """Names of the label ids, without the background."""
        return names_by_id(CLASS_NAMES, num_classes=len(CLASS_NAMES))

    @property
    def made_by(self) -> dict[str, object]:
        """Everything that decides a scan's labels, for the record."""
        first = self.parts[0].made_by
        return first | {"network": [part.made_by["network"] for part in self.parts]}

    def decide_volume(
        self,
        volume: Volume,
        *,
        confidence: bool = False,
        chosen: Sequence[int] = (),
        progress: Progress | None = None,
    ) -> Decided:
        """Return labels and facts about them, as `Scans.decide_volume`.

        Only one network is in memory at a time. A probability comes from the network
        whose label remains, among its own classes.
        """
        image = resampled(volume.array, volume.sides, spacing=self.spacing)
        affine = np.diag([self.spacing] * 3 + [1.0])
        scan = Volume(image, affine, affine, image.shape, volume.path)
        merged = Decision(confidence=confidence, chosen=(*chosen,)).empty(image.shape)
        for array in filter(lambda x: x is not None, merged):
            array[...] = 0
        for number, part in enumerate(self.parts):
            segmenter = load_nnunet(part.folder, **part.options)
            told = progress and _shifted(progress, number, len(self.parts))
            asked = {i: k for k, i in enumerate(chosen) if i in part.ids}
            own = [part.ids.tolist().index(i) for i in asked]
            found = segmenter.decide_volume(
                scan, confidence=confidence, chosen=own, progress=told
            )
            found = found._replace(labels=part.ids[found.labels])
            stands = found.labels > 0
            for whole, own_part in zip(merged[:3], found[:3], strict=True):
                if whole is not None:
                    np.copyto(whole, own_part, where=stands)
            for k, place in enumerate(asked.values()):
                merged.chosen[..., place] = found.chosen[..., k]
        for axis, side in enumerate(volume.array.shape):
            nearest = _nearest(merged.labels.shape[axis], side)
            merged = merged.each(lambda array, n=nearest, a=axis: array.take(n, a))
        return merged


@accepting_sums
def load_totalsegmentator(
    folder: str | Path = HOME, *, fast: bool | None = None, **options: Any
) -> TotalSegmentator:
    """Find and check the models of TotalSegmentator's task `total`.

    Args:
        folder: with Dataset291_... to Dataset295_..., or Dataset297_...
        fast: take the 3 mm model; None takes the five 1.5 mm models if they exist.
        options: as in `load_nnunet`, such as dtype="bfloat16".

    Raises:
        UserError: for missing models, as `load_nnunet`, and for a model with other
            classes.
    """
    root = absolute(folder)
    if (root / "nnunet/results").is_dir():
        root = root / "nnunet/results"
    checks.require(root.is_dir(), f"TotalSegmentator's folder {root} does not exist.")
    found = {spacing: _folders(root, TASKS[spacing]) for spacing in TASKS}
    spacing = max(TASKS) if fast else min(TASKS)
    if fast is None and None in found[spacing].values() and all(found[3.0].values()):
        spacing = 3.0
        logging.info("%s has the model of 3 mm, which is used.", root)
    missing = [f"Dataset{n}_*" for n, path in found[spacing].items() if path is None]
    checks.require(
        not missing,
        f"{root} lacks {checks.listed(missing)}, whose models segment the "
        f"{spacing:g} mm task `total`; download them with totalseg_download_weights.",
    )
    options = {"mirror": False, "overlap": OVERLAP, **options}
    parts = []
    for number, path in found[spacing].items():
        segmenter = load_nnunet(path, **options)
        names = segmenter.plan.names
        ids = _ids(names, TASKS[spacing][number], where=path)
        parts.append(Part(path, ids, options, segmenter.made_by))
    return TotalSegmentator(tuple(parts), spacing)


def _folders(root, datasets):
    """Return {dataset number: model folder, or None}."""
    found = {}
    for number in datasets:
        there = [p for p in sorted(root.glob(f"Dataset{number}_*")) if p.is_dir()]
        found[number] = nnunet_folder.find(there[0]) if there else None
    return found


def _ids(names, classes, *, where):
    """Return the table from a model's label ids to those of TotalSegmentator v2."""
    wanted = [CLASS_NAMES[i] for i in classes]
    same = set(names[1:]) == set(wanted)
    unnamed = len(names) - 1 == len(wanted) and not set(names[1:]) & set(CLASS_NAMES)
    checks.require(
        same or unnamed,
        f"{where} has {len(names) - 1} classes ({checks.listed(names[1:4])}, ...), but "
        f"must have {len(wanted)}, from {wanted[0]} to {wanted[-1]}.",
    )
    if not same:
        logging.warning("%s does not name its classes; they are taken in order.", where)
    given = [CLASS_IDS[name] for name in names[1:]] if same else classes
    return np.array([0, *given], np.uint8)


def resampled(
    image: np.ndarray, sides: Sequence[float], *, spacing: float
) -> np.ndarray:
    """Resample a scan [X, Y, Z] as TotalSegmentator does; truncate HU to integers.

    First and last voxels stay, so the true step differs a little from `spacing`. A scan
    with exactly this spacing stays as it is.
    """
    if tuple(sides) == (spacing,) * 3:
        return image
    zoom = np.asarray(sides) / spacing
    found = ndimage.zoom(image, zoom, np.float64, order=1, mode="nearest")
    return found.astype(np.int32).astype(np.float32)


def _nearest(n, m):
    """Return the nearest of n voxels for each of m, between the same ends."""
    step = (n - 1) / max(m - 1, 1)
    return np.floor(np.arange(m) * step + 0.5).astype(int)


def _shifted(progress, part, parts):
    """Count the windows of one of several parts."""
    return lambda done, number: progress(part * number + done, parts * number)
