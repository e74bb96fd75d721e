"""What is written of a scan, and what is there before and must not be lost unasked."""

import csv
import io
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import nibabel as nib
import numpy as np

from swinsmt_jax import checks
from swinsmt_jax.data import label_table, nifti
from swinsmt_jax.data.label_files import SUFFIXES, masks_in
from swinsmt_jax.data.nifti import Volume
from swinsmt_jax.inference import pictures
from swinsmt_jax.runtime.files import replacing, writable, write_text

Targets = Mapping[str, Mapping[str, Path]]  # by scan and kind


@dataclass(frozen=True)
class OutputOptions:
    """What is written for each scan besides or instead of its labels.

    Attributes:
        roi: classes to keep; empty keeps all.
        masks: a file for each class instead of one of labels.
        statistics: volume and mean HU of each class as CSV.
        preview: a picture.
        overwrite: segment again and replace what is there.
    """

    roi: Sequence[str] = ()
    masks: bool = False
    statistics: bool = False
    preview: bool = False
    overwrite: bool = False

    def files(self, output: Path, name: str) -> dict[str, Path]:
        """Return what is written of a scan: labels first, then the rest."""
        labels = name if self.masks else f"{name}{SUFFIXES[0]}"
        rest = {
            "statistics": f"{name}_statistics.csv",
            "preview": f"{name}_preview.png",
        }
        wanted = {kind: file for kind, file in rest.items() if getattr(self, kind)}
        return {k: output / file for k, file in {"labels": labels, **wanted}.items()}

    def remove_stale(self, output: Path, name: str) -> None:
        """Remove statistics and pictures of labels that were replaced."""
        every = replace(self, statistics=True, preview=True).files(output, name)
        for kind in every.keys() - self.files(output, name).keys():
            every[kind].unlink(missing_ok=True)


def write(
    files: Mapping[str, Path],
    volume: Volume,
    labels: np.ndarray,
    names: Mapping[int, str],
) -> None:
    """Write results of a scan; each appears when complete.

    Args:
        files: by kind, from `OutputOptions.files`.
        volume: the scan.
        labels: uint8 [X, Y, Z] on its grid.
        names: of the label ids to write.

    Raises:
        UserError: for what cannot be written.
    """
    for kind, path in files.items():
        with writable(path):
            if kind == "statistics":
                write_text(path, _statistics(volume, labels, names))
            elif kind == "preview":
                pictures.write_preview(path, volume, labels)
            elif path.name.endswith(SUFFIXES):
                table = label_table.xml(names)
                nifti.save_labels(path, labels, like=volume, description=table)
            else:
                _write_masks(path, labels, names, like=volume)


def _write_masks(path, labels, names, *, like):
    """Write a file for each class; the folder appears when all are there."""
    with replacing(path) as partial:
        partial.mkdir()
        for number, name in names.items():
            mask = (labels == number).astype(np.uint8)
            nifti.save(partial / f"{name}{SUFFIXES[0]}", mask, like=like)


def _statistics(volume, labels, names):
    """Return voxels, millilitres and mean HU of each class as CSV."""
    size = max(names, default=0) + 1
    flat = labels.reshape(-1)
    counts = np.bincount(flat, minlength=size)
    sums = np.bincount(flat, weights=volume.array.reshape(-1), minlength=size)
    millilitres = abs(np.linalg.det(volume.affine[:3, :3])) / 1000
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["class", "voxels", "volume_ml", "mean_hu"])
    for number, name in names.items():
        count = int(counts[number])
        mean = f"{sums[number] / count:.1f}" if count else ""
        writer.writerow([name, count, f"{count * millilitres:.3f}", mean])
    return text.getvalue()


def require_free(
    targets: Targets, scans: Mapping[str, Path], classes: Collection[str]
) -> None:
    """Raise `UserError` if an output would replace an input, or what is no mask.

    Args:
        targets: what would be written.
        scans: the inputs.
        classes: names that masks may have.
    """
    inputs = {
        place: file
        for file in scans.values()
        for place in (file.resolve(), *file.resolve().parents)
    }
    for path in (path for files in targets.values() for path in files.values()):
        checks.require(
            path.resolve() not in inputs,
            f"{path} would be written, but is, or holds, the input "
            f"{inputs.get(path.resolve())}; choose another --output.",
        )
        others = set(path.iterdir()) if path.is_dir() else set()
        if others:
            masks = masks_in(path)
            others -= {file for name, file in masks.items() if name in classes}
        checks.require(
            not others,
            f"masks would be written to {path}, but it holds other files, such as "
            f"{min(map(str, others), default='')}; choose another --output.",
        )


def require_classes(targets: Targets, names: Collection[str]) -> None:
    """Raise `UserError` if a target is there and about other classes than `names`."""
    for path in (path for files in targets.values() for path in files.values()):
        there = _classes_in(path)
        checks.require(
            there is None or there == set(names),
            f"{path} is there, of {len(there or ())} classes instead of the "
            f"{len(names)} wished; give --overwrite or another --output.",
        )


def is_whole(path: Path) -> bool:
    """Whether an output is there, neither empty nor cut short.

    Power cuts and full disks leave such files to programs that do not write as
    `files.replacing` does, and copies that broke off do too.
    """
    if path.is_dir():
        masks = masks_in(path).values()
        return bool(masks) and all(map(is_whole, masks))
    if not path.is_file() or path.stat().st_size < 4:
        return False
    if not path.name.endswith(SUFFIXES):
        return True
    try:
        array = nib.load(path).dataobj
    except (nib.filebasedimages.ImageFileError, OSError, EOFError, ValueError):
        return False
    size = array.offset + math.prod(array.shape) * array.dtype.itemsize
    if path.suffix != ".gz":
        return path.stat().st_size >= size
    with path.open("rb") as file:  # ends with the size of what it holds
        file.seek(-4, io.SEEK_END)
        return int.from_bytes(file.read(), "little") == size % 2**32


def _classes_in(path):
    """Return which classes an output is about; None if it does not say or is absent."""
    if path.is_dir():
        return set(masks_in(path))
    if not path.is_file():
        return None
    if path.suffix == ".csv":
        with path.open(newline="") as file:
            return {row.get("class") for row in csv.DictReader(file)}
    if not path.name.endswith(SUFFIXES):
        return None
    try:
        return set(label_table.of_header(nib.load(path).header).values()) or None
    except (nib.filebasedimages.ImageFileError, OSError, EOFError, ValueError):
        return None  # damaged
