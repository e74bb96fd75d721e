"""Preprocessed cases: chunked, compressed volumes that allow reading single crops.

<store>/store.json            format and options; made first
<store>/meta.csv              as in the source
<store>/s0001/image           int16 HU   } as in volume_file.py
<store>/s0001/label           uint8 ids  }
<store>/s0001/voxels.npz      samples of voxels, from which centres of crops are drawn
<store>/s0001/case.json       affine, shapes, boxes of the foreground, counts; made last

A case's folder appears under its name when it is complete.
"""

import contextlib
import functools
import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from zipfile import BadZipFile, ZipFile

import numpy as np
from absl import logging

from swinsmt_jax import checks, class_map
from swinsmt_jax.class_map import ClassMap
from swinsmt_jax.data import folds, meta, nifti, volume_file
from swinsmt_jax.data.resampling import covering_grid
from swinsmt_jax.data.sample import Sample, foreground_box, voxel_step
from swinsmt_jax.data.spacing import Sides, plain, text
from swinsmt_jax.data.volume import spacing_of
from swinsmt_jax.labels import IGNORED
from swinsmt_jax.runtime import files

FORMAT = 1
INDEX, CASE, VOXELS = "store.json", "case.json", "voxels.npz"
VOLUMES = ("image", "label")
LOCK = ".lock"
UNREADABLE = (OSError, ValueError, LookupError, TypeError, EOFError, BadZipFile)
SAMPLES = 20_000  # voxels of a kind kept at most
# HU above which the boxes of the foreground are found beforehand
FOREGROUND_THRESHOLDS_HU = (-1024, -1000, -500, -300, -200)


@dataclass(frozen=True)
class Options:
    """The options that decide the content of a store.

    Attributes:
        spacing: voxel side in mm, or three sides; 0 keeps each scan's own.
        classes: of the label ids.
        label_resampling: one of `resampling.LABEL_RULES`.
        overlaps: one of `nifti.OVERLAPS`.
    """

    spacing: Sides
    classes: ClassMap = class_map.V2
    label_resampling: str = "most"
    overlaps: str = "order"

    def to_json(self) -> dict:
        """Return these options as in the store's index."""
        return {
            "spacing": self.spacing,
            "classes": class_map.to_json(self.classes),
            "label_resampling": self.label_resampling,
            "overlaps": self.overlaps,
        }


@dataclass(frozen=True)
class StoredCase:
    """One preprocessed scan.

    Attributes:
        name: the case's id.
        split: "train", "val" or "test".
        folder: in the store.
    """

    name: str
    split: str
    folder: Path

    @property  # nothing read is kept: a dataset has thousands of cases
    def facts(self) -> dict:
        """Return the content of case.json that distinguishes one case from another."""
        found = read_json(self.folder / CASE)
        found.pop("times", None)  # of the files that it was made from
        return found

    @property
    def files(self) -> list[Path]:
        """The file that is written last."""
        return [self.folder / CASE]

    @property
    def shards(self) -> list[Path]:
        """The files of voxels; a label without any may have none."""
        found = (self.folder / part / volume_file.SHARD for part in VOLUMES)
        return [file for file in found if file.exists()]

    @property
    def affine(self) -> np.ndarray:
        """[4, 4], voxel indices to world millimetres, RAS."""
        return np.array(self.facts["affine"])

    @property
    def sides(self) -> tuple[float, float, float]:
        """Sides of its voxels in mm, to the right, front and head."""
        return spacing_of(self.affine)

    @property
    def shape(self) -> tuple[int, int, int]:
        """Sides in voxels."""
        return tuple(self.facts["shape"])

    @property
    def is_partial(self) -> bool:
        """Whether some of its classes or voxels are not annotated."""
        facts = self.facts
        return "annotated" in facts or "ignored" in facts

    @property
    def lacks_end(self) -> bool:
        """Whether its voxels end before its scan, as in some earlier stores."""
        facts = self.facts
        if "source_shape" not in facts:  # of no file
            return False
        affine, shape = nifti.ras_grid(facts["source_affine"], facts["source_shape"])
        sides = spacing_of(self.affine)
        if np.allclose(sides, spacing_of(affine), rtol=1e-4):
            return False
        covering, _ = covering_grid(shape, affine, spacing=sides)
        return any(np.less(facts["shape"], covering))

    def draw_centre(
        self, rng: np.random.Generator, *, labelled: bool, air: float
    ) -> Sequence[int] | None:
        """Draw from the sample of labelled voxels, or of other voxels with HU > air."""
        file = self.folder / VOXELS
        with _readable(file), ZipFile(file) as members:
            if labelled:
                voxels = _int16(members, "foreground").reshape(-1, 3)
            else:
                above = _int16(members, "background_hu") > air
                voxels = _int16(members, "background").reshape(-1, 3)[above]
        return voxels[rng.integers(len(voxels))].tolist() if len(voxels) else None

    def read(self, box: Sequence[slice] | None = None) -> Sample:
        """Read image and label, or the voxels of a box inside the volume.

        Raises:
            UserError: for a file that is missing or damaged.
        """
        box = tuple(box or (slice(None),) * 3)
        with _readable(self.folder):
            volumes = [volume_file.opened(self.folder / part) for part in VOLUMES]
            parts = [volume[box].read() for volume in volumes]
            image, label = (part.result() for part in parts)
            facts = self.facts
            _require_whole(self.folder, facts, volumes)
            affine = facts["affine"] @ voxel_step([part.start or 0 for part in box])
            annotated = tuple(facts["annotated"]) if "annotated" in facts else None
        return Sample(image, label, affine, self.name, annotated=annotated)

    def bounds(self, air: float) -> tuple[slice, slice, slice]:
        """Return the smallest box around the voxels with HU > air; crops lie in it.

        If `air` is not in `FOREGROUND_THRESHOLDS_HU`, the whole image is read, once per
        process.
        """
        stored = self.facts["boxes"].get(f"{air:g}")
        if stored:
            x, y, z = (slice(*ends) for ends in stored)
            return x, y, z
        if air not in self._boxes:
            logging.log_first_n(
                logging.WARNING,
                "the store knows the foreground above %s HU, but hu_range begins at "
                "%g: each process reads every scan whole, once.",
                1,
                ", ".join(map(str, FOREGROUND_THRESHOLDS_HU)),
                air,
            )
            self._boxes[air] = foreground_box(self.read().image, air=air)
        return self._boxes[air]

    @functools.cached_property
    def _boxes(self) -> dict:
        return {}


def is_store(root: str | Path) -> bool:
    """Whether a folder is a store."""
    return (Path(root) / INDEX).is_file()


@contextlib.contextmanager
def opened(root: Path, options: Options) -> Iterator[None]:
    """Make the folder with its index, or check that it has these options; lock it.

    Partial files of killed runs are removed.

    Raises:
        UserError: for other options, a folder that contains something else, and one
            that another run is writing to.
    """
    checks.require(
        is_store(root)
        or not root.exists()
        or {f.name for f in root.iterdir()} <= {LOCK},
        f"the folder {root} holds other files; choose an empty or new --store.",
    )
    root.mkdir(parents=True, exist_ok=True)
    remedy = "choose another --store"
    with files.locked(root / LOCK, what=f"the store {root}", remedy=remedy):
        _open_index(root, options)
        yield


def _open_index(root, options):
    file = root / INDEX
    if file.exists():
        require_options(root, options)
    else:
        files.write_json(file, {"format": FORMAT, "options": options.to_json()})
    files.remove_partial(root)


def require_options(root: Path, options: Options) -> None:
    """Raise `UserError` for a store with other options; groups may differ."""
    found = read_options(root)
    for flag, made, wanted in (
        ("spacing", text(found.spacing), text(options.spacing)),
        ("label_resampling", found.label_resampling, options.label_resampling),
        ("overlaps", found.overlaps, options.overlaps),
    ):
        checks.require(
            made == wanted,
            f"the store {root} was made with --{flag}={made}, but now {wanted} is "
            "wanted; choose another --store.",
        )
    checks.require(
        found.classes.names == options.classes.names,
        f"the store {root} was made with the classes "
        f"{checks.few(found.classes.names[1:])}, but now "
        f"{checks.few(options.classes.names[1:])} are wanted; choose another --store.",
    )


def read_options(root: Path) -> Options:
    """Return the options of a store."""
    found = read_json(root / INDEX)
    checks.require(
        found.get("format") == FORMAT,
        f"the store {root} has format {found.get('format')!r}, but this version reads "
        f"{FORMAT}; preprocess again.",
    )
    with _readable(root / INDEX):
        options = found["options"]
        classes = class_map.from_json(options["classes"], where=str(root / INDEX))
        rule = options.get("label_resampling", "most")
        overlaps = options.get("overlaps", "order")
        return Options(plain(options["spacing"]), classes, rule, overlaps)


def find_cases(
    root: str | Path, *, split: str, fold: int = -1
) -> tuple[StoredCase, ...]:
    """List the cases of a split in the order of meta.csv, without failed ones.

    A `fold` of a cross-validation, from 0 on, redistributes training and validation.

    Raises:
        UserError: for an unfinished store, a lost case, and an empty split.
    """
    checks.one_of("split", split, meta.SPLITS)
    root = files.absolute(root)
    read_options(root)
    index = read_json(root / INDEX)
    rows = {
        n: s for n, s in meta.read(root).items() if n not in index.get("failed", {})
    }
    rows = folds.divided(rows, fold, folds=index.get("folds", ()))
    names = [name for name, own in rows.items() if own == split]
    lost = [f"{name} ({file})" for name in names if (file := _lost_file(root / name))]
    checks.require(
        not lost,
        f"the store {root} lacks {len(lost)} cases of its meta.csv, or files of theirs,"
        f" such as {', '.join(lost[:3])}: it is not finished, or lost them. Run "
        "preprocess.py again with the same flags; finished cases are kept.",
    )
    if not names:
        raise meta.EmptySplitError(
            f"the store {root} holds no case of the split {split!r}."
        )
    cases = tuple(StoredCase(name, split, root / name) for name in names)
    cut = [case.name for case in cases if case.lacks_end]
    if cut:
        logging.warning(
            "the store %s was made before grids covered scans: %d of %d cases of %r "
            "lack up to half a voxel at the end of an axis, such as %s; preprocess to "
            "another --store to train on it.",
            *(root, len(cut), len(cases), split, ", ".join(cut[:3])),
        )
    return cases


def damage(folder: Path, *, whole: bool) -> str | None:
    """Describe missing or unreadable parts of a case; None if it is sound.

    Args:
        folder: of the case in the store.
        whole: read all voxels, and compare the labels with the counts in case.json.
    """
    try:
        with _readable(folder):
            volumes = [volume_file.open_volume(folder / part) for part in VOLUMES]
            facts = read_json(folder / CASE)
            _require_whole(folder, facts, volumes)
            with ZipFile(folder / VOXELS) as members:
                for name in members.namelist():
                    members.read(name)
            if whole:
                _, label = (volume.read().result() for volume in volumes)
                if _counts(label, len(facts["counts"])) != {
                    key: facts[key] for key in ("counts", "ignored") if key in facts
                }:
                    raise ValueError(f"its labels are not those that {CASE} counts")
    except checks.UserError as error:
        return str(error)
    return None


def _require_whole(folder, facts, volumes):
    """Raise `ValueError` if a case lacks a file, or its volumes have wrong shapes."""
    lost = _lost_file(folder)  # asked after reading, for it may have just vanished
    if lost:
        raise ValueError(f"{lost.relative_to(folder)} is missing")
    for name, volume in zip(VOLUMES, volumes, strict=True):
        if list(volume.shape) != facts["shape"]:
            raise ValueError(
                f"{name} has shape {volume.shape}, but {CASE} says {facts['shape']}"
            )


def _lost_file(folder):
    """Return a file that a case lacks; None if it is complete.

    Stores of earlier versions lack a shard of labels if nothing is labelled.
    """
    image, label = (folder / part / volume_file.SHARD for part in VOLUMES)
    metadata = (folder / part / volume_file.METADATA for part in VOLUMES)
    for file in (folder / CASE, folder / VOXELS, *metadata, image):
        if not file.is_file():
            return file
    if not label.is_file() and any(read_json(folder / CASE)["counts"][1:]):
        return label
    return None


def _int16(members, name):
    """Read an array of an open .npz file, flat.

    `numpy.load` lets Python parse the header. This sometimes fails if several threads
    do so at once (CPython 3.11: "AST constructor recursion depth mismatch").
    """
    content = members.read(f"{name}.npy")
    start = 10 + int.from_bytes(content[8:10], "little")
    return np.frombuffer(content, "<i2", offset=start)


def write_case(root: Path, sample: Sample, *, num_classes: int, facts: Mapping) -> dict:
    """Write a case; its folder appears when it is complete.

    Args:
        root: of the store.
        sample: int16 HU and uint8 labels in RAS orientation.
        num_classes: label ids, including the background.
        facts: more for case.json.

    Returns:
        The content of case.json.
    """
    with files.replacing(root / sample.name) as partial:
        partial.mkdir()
        for name, array in (("image", sample.image), ("label", sample.label)):
            volume_file.write(partial / name, array)
        np.savez(partial / VOXELS, **_voxels(sample))
        content = {
            **facts,
            "shape": sample.image.shape,
            "affine": sample.affine.tolist(),
            **_counts(sample.label, num_classes),
            "cut": _cut(sample.label),
            "boxes": {
                f"{air:g}": _box(sample, air) for air in FOREGROUND_THRESHOLDS_HU
            },
        }
        if sample.annotated is not None:
            content["annotated"] = list(sample.annotated)
        (partial / CASE).write_text(json.dumps(content, indent=1) + "\n")
    return content


def _counts(label, num_classes):
    """Return the voxels of each label id, and the number of ignored ones."""
    found = np.bincount(label.reshape(-1), minlength=IGNORED + 1).tolist()
    last = max(num_classes, max(np.flatnonzero(found[:IGNORED]), default=0) + 1)
    ignored = {"ignored": found[IGNORED]} if found[IGNORED] else {}
    return {"counts": found[:last], **ignored}


def _voxels(sample):
    """Draw samples of the labelled voxels and of the rest."""
    rng = np.random.default_rng(
        int(hashlib.sha256(sample.name.encode()).hexdigest(), 16)
    )

    def drawn(wanted):
        indices = np.flatnonzero(wanted)
        if indices.size > SAMPLES:
            indices = rng.choice(indices, SAMPLES, replace=False)
        places = np.unravel_index(np.sort(indices), wanted.shape)
        return np.stack(places, axis=1).astype(np.int16)

    rest = drawn(sample.label == 0)
    return {
        "foreground": drawn((sample.label > 0) & (sample.label != IGNORED)),
        "background": rest,
        "background_hu": sample.image[tuple(rest.T)],
    }


def _cut(label):
    """Return the ids of structures that reach the edge of the scan."""
    faces = [
        label.take(end, axis)
        for axis in range(3)
        for end in (0, -1)
        if label.shape[axis] > 1
    ]
    found = set().union(*(np.unique(face).tolist() for face in faces))
    return sorted(found - {0, IGNORED})


def _box(sample, air):
    return [[side.start, side.stop] for side in foreground_box(sample.image, air=air)]


def read_json(file: Path) -> Any:
    """Read a JSON file of a store; raise `UserError` if that fails."""
    with _readable(file):
        return files.read_json(file)


@contextlib.contextmanager
def _readable(path):
    try:
        yield
    except UNREADABLE as error:
        raise checks.UserError(
            f"{path} of the store cannot be read ({checks.one_line(error, 600)}); "
            "remove this case's folder and run preprocess.py again."
        ) from error
