"""Outputs of a scan, and protection of existing files."""

import csv
import io
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import nibabel as nib
import numpy as np

from swinsmt_jax import checks
from swinsmt_jax.data import itk_file, label_table, nifti, nifti_file
from swinsmt_jax.data.label_files import masks_in
from swinsmt_jax.inference import pictures
from swinsmt_jax.inference.grid import STEPS
from swinsmt_jax.results import (
    anatomy,
    colour_tables,
    dicom_seg,
    meshes,
    statistics,
    viewer,
)
from swinsmt_jax.results.result import Result
from swinsmt_jax.runtime import csv_text
from swinsmt_jax.runtime.files import is_litter, remove, replacing, writable

FORMATS = ("nii.gz", "nii", "nrrd", "mha")  # of labels
Targets = Mapping[str, Mapping[str, Path]]  # by scan and kind


class Kind(NamedTuple):
    """An output of a scan besides its labels.

    Attributes:
        ending: follows the scan's name; without a dot it names a folder.
        write: makes the file at a path, from the result and the option's value.
        help: of the flag.
        choices: values of the flag; empty for a switch.
        require: raises `UserError` for a scan that cannot have it.
        listed: whether the flag's values are names of classes.
    """

    ending: str
    write: Callable[[Path, Result, str], None]
    help: str
    choices: tuple[str, ...] = ()
    require: Callable[[Path], None] = lambda scan: None
    listed: bool = False


def _text(make):
    return lambda path, result, _: path.write_text(make(result), encoding="utf-8")


def _write_probabilities(path, result, _):
    """Write one NIfTI file per chosen class, which readers scale to 0 to 1."""
    path.mkdir()
    for name, array in result.chosen.items():
        nifti.save(path / f"{name}.nii.gz", array, like=result.volume, slope=1 / STEPS)


KINDS = {
    "statistics": Kind(
        "_statistics.csv",
        _text(statistics.as_csv),
        "also write volume, HU, mass and extent of each class as CSV",
    ),
    "statistics_json": Kind(
        "_statistics.json", _text(statistics.as_json), "also write them as JSON"
    ),
    "probabilities": Kind(
        "_probabilities",
        _write_probabilities,
        "also write the probabilities of these classes as NIfTI, in steps of 1/255",
        listed=True,
    ),
    "quality": Kind(
        "_quality.json",
        _text(anatomy.as_json),
        "also check the anatomy: pieces, volumes, order, sides, what the scan cuts",
    ),
    "preview": Kind(
        "_preview.png",
        lambda path, result, _: pictures.write_preview(
            path,
            result.volume,
            result.labels,
            [result.names.get(i, "") for i in range(max(result.names, default=0) + 1)],
        ),
        "also write a picture",
    ),
    "colours": Kind(
        "_colours.ctbl",
        _text(lambda result: colour_tables.slicer(result.names)),
        "also write names and colours for 3D Slicer",
    ),
    "itk_snap": Kind(
        "_itk_snap.txt",
        _text(lambda result: colour_tables.itk_snap(result.names)),
        "also write names and colours for ITK-SNAP",
    ),
    "seg": Kind(
        "_seg.dcm",
        dicom_seg.write,
        "also write a DICOM segmentation for scans that are DICOM series",
        dicom_seg.KINDS,
        dicom_seg.require,
    ),
    "mesh": Kind(
        "_mesh",
        meshes.write,
        "also write a surface of each class",
        meshes.FORMATS,
        lambda scan: meshes.require(),
    ),
    "view": Kind(
        "_view.html",
        lambda path, result, _: viewer.write(path, result),
        "also write a page that shows scan and labels offline",
        require=lambda scan: viewer.require(),
    ),
}


@dataclass(frozen=True)
class OutputOptions:
    """What to write for each scan besides or instead of its labels.

    Attributes:
        roi: classes to keep; empty keeps all.
        masks: write one file per class instead of one label file.
        format: of `FORMATS`; None takes the scan's, and nii.gz for NIfTI and DICOM.
        clean: keep the largest piece of structures that should be one piece.
        overwrite: segment again and replace existing files.
        confidence: add the network's confidence to the statistics.
        statistics, statistics_json, probabilities, quality, preview, colours, itk_snap,
            seg, mesh, view: of `KINDS`; True, one of the kind's choices, or classes.
    """

    roi: Sequence[str] = ()
    masks: bool = False
    format: str | None = None
    clean: bool = False
    overwrite: bool = False
    confidence: bool = False
    statistics: bool = False
    statistics_json: bool = False
    probabilities: Sequence[str] = ()
    quality: bool = False
    preview: bool = False
    colours: bool = False
    itk_snap: bool = False
    seg: str | None = None
    mesh: str | None = None
    view: bool = False

    def __post_init__(self) -> None:
        """Check the choices; raise `UserError` for an unknown one."""
        if self.format:
            checks.one_of("the option format", self.format, FORMATS)
        for name, kind in KINDS.items():
            if kind.choices and (value := getattr(self, name)):
                checks.one_of(f"the option {name}", value, kind.choices)
        if self.confidence and not self.statistics_json:
            object.__setattr__(self, "statistics", True)

    @property
    def made_by(self) -> dict[str, object]:
        """Everything besides the segmenter that decides a scan's labels."""
        return {"clean": True} if self.clean else {}

    def ending(self, scan: Path) -> str:
        """Return the ending of a scan's label files."""
        if self.format is None and itk_file.is_itk(scan):
            return ".nrrd" if scan.suffix.lower() == ".nrrd" else ".mha"
        return f".{self.format or FORMATS[0]}"

    @property
    def of_network(self) -> tuple[str, ...]:
        """The kinds that need the network, since probabilities are not kept."""
        statistics = ("statistics", "statistics_json") if self.confidence else ()
        return (*statistics, "probabilities")

    def files(self, output: Path, name: str, scan: Path) -> dict[str, Path]:
        """Return the files of a scan: labels first, then the rest."""
        labels = name if self.masks else f"{name}{self.ending(scan)}"
        rest = {
            kind: f"{name}{what.ending}"
            for kind, what in KINDS.items()
            if getattr(self, kind)
        }
        return {k: output / file for k, file in {"labels": labels, **rest}.items()}

    def require_possible(self, scans: Collection[Path]) -> None:
        """Raise `UserError` for a scan that cannot have the requested outputs."""
        for kind, what in KINDS.items():
            for scan in scans if getattr(self, kind) else ():
                what.require(scan)

    def remove_results(self, output: Path, name: str) -> None:
        """Remove outputs of labels that are about to be replaced."""
        for what in KINDS.values():
            path = output / f"{name}{what.ending}"
            if path.exists():
                remove(path) if path.is_dir() else path.unlink()


def write(files: Mapping[str, Path], result: Result, options: OutputOptions) -> None:
    """Write the results of a scan; each appears when complete.

    Labels come after the outputs that need the network, so it runs again if one of
    those is missing.

    Args:
        files: by kind, from `OutputOptions.files`.
        result: the labels.
        options: with the values of the kinds.

    Raises:
        UserError: for what cannot be written.
    """
    first = [kind for kind in files if kind in options.of_network]
    for kind, path in sorted(files.items(), key=lambda item: item[0] not in first):
        with writable(path):
            if kind != "labels":
                with replacing(path) as partial:
                    KINDS[kind].write(partial, result, getattr(options, kind))
            elif nifti_file.is_named(path):
                table = label_table.xml(result.names)
                nifti.save_labels(
                    path, result.labels, like=result.volume, description=table
                )
            else:
                _write_masks(path, result, options.ending(result.volume.path))


def _write_masks(path, result, ending):
    """Write one file per class; the folder appears when all are complete."""
    with replacing(path) as partial:
        partial.mkdir()
        for number, name in result.names.items():
            mask = (result.labels == number).astype(np.uint8)
            nifti.save(partial / f"{name}{ending}", mask, like=result.volume)


def require_free(
    targets: Targets, scans: Mapping[str, Path], classes: Collection[str]
) -> None:
    """Raise `UserError` if an output would replace an input or a non-mask file.

    Args:
        targets: what would be written.
        scans: the inputs.
        classes: possible names of masks.
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
        others = set()
        if path.is_dir():
            others = {file for file in path.iterdir() if not is_litter(file)}
        of_classes = {*masks_in(path).items()} if others else set()
        of_classes |= {(f.stem, f) for f in others if f.suffix[1:] in meshes.FORMATS}
        others -= {file for name, file in of_classes if name in classes}
        checks.require(
            not others,
            f"results would be written to {path}, but it holds other files, such as "
            f"{min(map(str, others), default='')}; choose another --output.",
        )


def require_network(targets: Targets, options: OutputOptions) -> None:
    """Raise `UserError` if labels exist without an output that needs the network."""
    for files in targets.values():
        for kind in options.of_network if is_whole(files["labels"]) else ():
            if kind not in files:
                continue
            flag = "probabilities" if kind == "probabilities" else "confidence"
            checks.require(
                _tells(kind, files[kind], options),
                f"{files['labels']} exists, but not {files[kind]} as --{flag} asks "
                "for it, and labels contain no probabilities; give --overwrite.",
            )


def _tells(kind, path, options):
    """Whether a file contains what only the network can compute."""
    if not is_whole(path):
        return False
    if kind == "probabilities":
        return set(masks_in(path)) == set(options.probabilities)
    with path.open(encoding="utf-8") as file:
        return statistics.CONFIDENCE[0] in (
            file.read() if kind == "statistics_json" else file.readline()
        )


def require_classes(targets: Targets, names: Collection[str]) -> None:
    """Raise `UserError` if a target exists for other classes than `names`."""
    for path in (
        files[kind]
        for files in targets.values()
        for kind in ("labels", "statistics")
        if kind in files
    ):
        there = _classes_in(path)
        checks.require(
            there is None or there == set(names),
            f"{path} exists, with {len(there or ())} classes instead of the "
            f"{len(names)} requested; give --overwrite or another --output.",
        )


def is_whole(path: Path) -> bool:
    """Whether an output exists and is neither empty nor truncated.

    Power cuts and full disks leave such files behind if a program does not write like
    `files.replacing`. So do interrupted copies.
    """
    if path.is_dir():
        inside = [file for file in path.iterdir() if not is_litter(file)]
        return bool(inside) and all(map(is_whole, inside))
    if not path.is_file() or path.stat().st_size < 4:
        return False
    if not nifti_file.is_named(path):
        return True
    if itk_file.is_itk(path):
        try:
            with nifti_file.named(path):
                return np.asarray(itk_file.opened(path).dataobj).ndim == 3
        except checks.UserError:
            return False
    try:
        image: Any = nib.load(path)
        array = image.dataobj
    except (nib.filebasedimages.ImageFileError, OSError, EOFError, ValueError):
        return False
    size = array.offset + math.prod(array.shape) * array.dtype.itemsize
    if path.suffix != ".gz":
        return path.stat().st_size >= size
    with path.open("rb") as file:  # ends with the size of what it holds
        file.seek(-4, io.SEEK_END)
        return int.from_bytes(file.read(), "little") == size % 2**32


def _classes_in(path):
    """Return the classes of an output; None if it does not state them or is absent."""
    if path.is_dir():
        return set(masks_in(path))
    if not path.is_file():
        return None
    if path.suffix == ".csv":
        with path.open(newline="") as file:
            rows = csv.DictReader(file)
            return {csv_text.read_cell(row.get("class") or "") for row in rows}
    if not nifti_file.is_named(path):
        return None
    try:
        header = (itk_file.opened if itk_file.is_itk(path) else nib.load)(path).header
        return set(label_table.of_header(header).values()) or None
    except (
        checks.UserError,
        nib.filebasedimages.ImageFileError,
        OSError,
        EOFError,
        ValueError,
    ):
        return None  # damaged
