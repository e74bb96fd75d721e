"""Segment many scans: find them, write what is wanted, pass over what fails."""

import contextlib
import csv
import io
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from absl import logging
from tqdm import tqdm

from swinsmt_jax import checks
from swinsmt_jax.class_map import ClassMap
from swinsmt_jax.data import dicom, label_table, nifti
from swinsmt_jax.data.label_files import SUFFIXES, load_prediction
from swinsmt_jax.inference import outputs, pictures
from swinsmt_jax.inference.segmenter import Segmenter, load_scan
from swinsmt_jax.runtime.files import replacing, write_json, write_text

SUMMARY = "summary.json"
TRUTH = "segmentations"  # stem of the labels beside a ct.nii.gz of TotalSegmentator's


@dataclass(frozen=True)
class Wishes:
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


def find_scans(inputs: Sequence[str | Path]) -> dict[str, Path]:
    """Return {name: file} of NIfTI files and of those in folders, sorted by folder.

    In folders, hidden files and TotalSegmentator's `segmentations.nii.gz` are no scans.
    A folder without any that holds a DICOM series is a scan itself. The name is that of
    the file without its suffix, or of its folder for `ct.nii.gz` and where several
    files have one name.

    Raises:
        UserError: for an input that does not exist, is no NIfTI file or a folder
            without any, and for scans that would have one name.
    """
    files = [file for given in inputs for file in _files(Path(given))]
    stems = [_stem(file) for file in files]
    names = [
        stem if stems.count(stem) == 1 and stem != "ct" else file.absolute().parent.name
        for file, stem in zip(files, stems, strict=True)
    ]
    for name in names:
        same = [str(f) for f, n in zip(files, names, strict=True) if n == name]
        checks.require(
            len(same) == 1,
            f"{len(same)} inputs would all be written as {name!r}: {', '.join(same)}; "
            "rename them, or segment them one after the other.",
        )
    return dict(zip(names, files, strict=True))


def segment_scans(
    segmenter: Segmenter, scans: Mapping[str, Path], output: Path, wishes: Wishes
) -> dict[str, dict]:
    """Segment each scan and write its results to the folder `output`.

    Files appear when complete. What is there stays unless `wishes.overwrite`: a scan
    of which nothing is missing is skipped, and statistics and pictures are made of the
    labels that are there. Whatever fails on one scan does not stop the others.

    Returns:
        {name: {"file", "labels", "seconds", "structures"}}, with {"error"} for those
        that failed and without "seconds" for those not segmented. `summary.json` holds
        them and those of earlier calls.

    Raises:
        UserError: before anything is written, for classes that the network does not
            give, an output path that cannot be a folder, outputs in the place of
            inputs, and labels of other classes that are there.
    """
    names = _wanted(segmenter, wishes.roi)
    targets = {name: wishes.files(output, name) for name in scans}
    outputs.require_free(targets, scans, segmenter.class_names.values())
    if not wishes.overwrite:
        outputs.require_classes(targets, names.values())
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise checks.UserError(
            f"the output folder {output} cannot be made: {error.strerror}; choose "
            "another --output."
        ) from error
    summary, record = {}, _read_summary(output / SUMMARY)
    for number, (name, file) in enumerate(scans.items(), start=1):
        found = {"file": str(file), "labels": str(targets[name]["labels"])}
        missing = targets[name]
        if missing["labels"].exists() and not wishes.overwrite:
            missing = {k: path for k, path in missing.items() if not path.exists()}
        if missing:
            title = f"{name} ({number} of {len(scans)})"
            try:
                kept = None if "labels" in missing else targets[name]["labels"]
                found |= _segment(segmenter, file, kept, missing, names, title)
                if wishes.overwrite:
                    _remove_stale(output, name, wishes)
            except checks.UserError as error:
                logging.error("%s: %s", name, error)
                found["error"] = str(error)
            except Exception as error:  # memory, a bug: other scans may do without it
                logging.exception("%s failed", name)
                found["error"] = f"{type(error).__name__}: {error}"
        summary[name] = found
        before = record.get(name, {}) if "seconds" not in found else {}
        record[name] = {k: v for k, v in before.items() if k != "error"} | found
        write_json(output / SUMMARY, record)
    return summary


def _remove_stale(output, name, wishes):
    """Remove statistics and pictures of labels that were replaced."""
    every = replace(wishes, statistics=True, preview=True).files(output, name)
    for kind in every.keys() - wishes.files(output, name).keys():
        every[kind].unlink(missing_ok=True)


def _segment(segmenter, file, kept, missing, names, title):
    """Write what is missing of a scan, from the labels kept in a file if there are."""
    volume = load_scan(file)
    for note in volume.notes:
        logging.warning("%s", note)
    facts = {}
    if kept is None:
        start = time.perf_counter()
        with _bar(title) as progress:
            labels = segmenter.segment_volume(volume, progress=progress)
        facts["seconds"] = round(time.perf_counter() - start, 2)
        wanted = np.zeros(256, np.uint8)
        wanted[list(names)] = list(names)
        labels = wanted[labels]
    else:
        classes = ClassMap(("background", *segmenter.class_names.values()))
        labels = load_prediction(kept, classes=classes, like=volume)
    try:
        for kind, target in missing.items():
            if kind == "statistics":
                _write_statistics(target, volume, labels, names)
            elif kind == "preview":
                pictures.write_preview(target, volume, labels)
            elif target.name.endswith(SUFFIXES):
                table = label_table.xml(names)
                nifti.save_labels(target, labels, like=volume, description=table)
            else:
                _write_masks(target, labels, names, like=volume)
    except OSError as error:
        raise checks.UserError(
            f"{target} cannot be written: {error}; make room or mend the permissions."
        ) from error
    found = np.unique(labels).tolist()
    return facts | {"structures": [names[i] for i in found if i in names]}


def _read_summary(file):
    try:
        found = json.loads(file.read_text())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _write_masks(target, labels, names, *, like):
    """Write a file for each class; the folder appears when all are there."""
    with replacing(target) as partial:
        partial.mkdir()
        for number, name in names.items():
            mask = (labels == number).astype(np.uint8)
            nifti.save(partial / f"{name}{SUFFIXES[0]}", mask, like=like)


def _write_statistics(path, volume, labels, names):
    """Write voxels, millilitres and mean HU of each class."""
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
    write_text(path, text.getvalue())


@contextlib.contextmanager
def _bar(title) -> Iterator:
    with tqdm(desc=title, unit="window", dynamic_ncols=True) as bar:

        def progress(done, number):
            bar.total = number
            bar.update(done - bar.n)

        yield progress


def _wanted(segmenter, roi):
    names = segmenter.class_names
    for name in roi:
        checks.one_of("a class of roi", name, names.values())
    return {i: name for i, name in names.items() if not roi or name in roi}


def _files(path: Path) -> list[Path]:
    checks.require(path.exists(), f"the input {path} does not exist.")
    if path.is_file():
        checks.require(
            path.name.endswith(SUFFIXES),
            f"the input {path} is no NIfTI file; its name must end with "
            ".nii or .nii.gz.",
        )
        return [path]
    files = sorted(
        file
        for suffix in SUFFIXES
        for file in path.glob(f"[!.]*{suffix}")
        if file.is_file() and _stem(file) != TRUTH
    )
    if not files and dicom.is_series(path):
        return [path]
    checks.require(
        bool(files),
        f"the folder {path} holds no .nii, .nii.gz or DICOM files; folders in it are "
        "not searched.",
    )
    return files


def _stem(file: Path) -> str:
    suffix = next((s for s in SUFFIXES if file.name.endswith(s)), "")
    return file.name.removesuffix(suffix)
