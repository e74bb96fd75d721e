"""The TotalSegmentator-V2 layout: cases of a split, and their CT and merged labels.

<root>/meta.csv                          semicolon-separated; image_id, split
<root>/s0001/ct.nii.gz
<root>/s0001/segmentations/<class>.nii.gz   117 binary masks, or instead
<root>/s0001/segmentations.nii.gz           one volume of label ids
"""

import csv
import glob
import os
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from swinsmt_jax import checks, labels
from swinsmt_jax.class_map import V2, ClassMap
from swinsmt_jax.data import nifti

SPLITS = ("train", "val", "test")
SUFFIX, META = ".nii.gz", "meta.csv"
RESERVED = (META, "store.json", "report.json", "report.html")  # files of a store
LONGEST = 200  # bytes of an id; file systems take 255 with what is added to it
CLASS = "{class}"  # stands for the name of a class in the path of masks


@dataclass(frozen=True)
class Case:
    """One scan on disk; `segmentation` is one label file, or has `CLASS` in it."""

    name: str
    ct: Path
    split: str
    segmentation: Path


@dataclass(frozen=True)
class Sample:
    """One scan in memory, in RAS orientation.

    Attributes:
        image: [X, Y, Z], int16 HU; float32 once scaled.
        label: [X, Y, Z], uint8 label ids.
        affine: [4, 4], voxel indices to world millimetres.
        name: the case's id.
        overlapping: claims of masks to voxels that another mask has too.
        source_shape: shape of the file's array, in its own axes.
        source_affine: [4, 4] of the file.
        notes: what a user should know about the CT's file.
    """

    image: np.ndarray
    label: np.ndarray
    affine: np.ndarray
    name: str
    overlapping: int = 0
    source_shape: tuple[int, ...] = ()
    source_affine: np.ndarray | None = None
    notes: tuple[str, ...] = ()


def find_cases(root: str | Path, *, split: str) -> tuple[Case, ...]:
    """List the cases of a split, in the order of `meta.csv`.

    Where a case has both the label file and the folder of masks, the file is taken.

    Raises:
        UserError: for a missing folder, `meta.csv`, column, CT or segmentation, an id
            that is repeated or not a plain folder name, and an empty split.
    """
    checks.one_of("split", split, SPLITS)
    root = Path(root)
    rows = read_meta(root)
    names = [name for name, row_split in rows.items() if row_split == split]
    counts = {s: list(rows.values()).count(s) for s in SPLITS}
    checks.require(
        bool(names),
        f"{root / 'meta.csv'} lists no case of the split {split!r}; it has "
        + ", ".join(f"{n} of {s!r}" for s, n in counts.items())
        + ".",
    )
    return tuple(case_of(root, name, split) for name in names)


def read_meta(root: Path, *, refused: dict[str, str] | None = None) -> dict[str, str]:
    """Read `meta.csv` as {case id: split}, in file order, with the errors above.

    Where `refused` is given, lines that cannot be used do not raise: {case or line:
    reason} enters it, and the others are read. Of a repeated id no line is used, since
    its split is unknown.
    """
    path = root / META
    checks.require(
        root.is_dir(),
        f"data folder {root} does not exist; download TotalSegmentator-V2 from "
        f"{labels.RECORD}, or make phantoms: python -m swinsmt_jax.phantoms "
        f"--root={root}",
    )
    checks.require(
        path.is_file(),
        f"{path} does not exist, but names the split of every case; the folder must be "
        f"laid out as TotalSegmentator-V2 downloads ({labels.RECORD}).",
    )
    columns, rows = _table(path)
    for column in ("image_id", "split"):
        checks.require(
            column in columns,
            f"{path} has the columns {columns}, but needs {column!r}; columns are "
            "separated by semicolons.",
        )
    splits = {}
    for line, row in enumerate(rows, start=2):
        name, split = (row["image_id"] or "").strip(), (row["split"] or "").strip()
        where = f"line {line} of {path}"
        used = where
        try:
            require_id(f"{where}: image_id", name)
            used = name
            checks.require(
                name not in splits,
                f"{where} repeats the image_id {name!r}; remove it.",
            )
            checks.one_of(f"the split of {name!r} on {where}", split, SPLITS)
            splits[name] = split
        except checks.UserError as error:
            if refused is None:
                raise
            refused[used] = str(error)
    return {n: split for n, split in splits.items() if n not in (refused or {})}


def _table(path):
    """Return columns and rows of meta.csv."""
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file, delimiter=";")
            return list(reader.fieldnames or ()), list(reader)
    except (UnicodeDecodeError, csv.Error) as error:
        raise checks.UserError(
            f"{path} cannot be read: {error}; save it as CSV in UTF-8."
        ) from error


def require_id(what: str, name: object) -> None:
    """Raise `UserError` unless `name` can be the name of a case's folder in a store."""
    checks.require(
        isinstance(name, str)
        and name.strip() == name != ""
        and name.isprintable()
        and name[0] != "."
        and not set(name) & set("/\\:;")
        and name.lower() not in RESERVED
        and len(name.encode()) <= LONGEST,
        f"{what} is {name!r}, but must be the plain name of a folder, such as 's0001': "
        f"at most {LONGEST} bytes, no leading dot, none of / \\ : ; and none of "
        f"{', '.join(RESERVED)}. Rename the case.",
    )


def add_to_meta(root: Path, splits: dict[str, str]) -> None:
    """Add cases {id: split} to `meta.csv`, made if absent; other rows stay as they are.

    The file is written as the real one, with a byte-order mark, and appears complete.
    """
    path = root / META
    columns, rows = ["image_id", "split"], []
    if path.is_file():
        columns, found = _table(path)
        rows = [row for row in found if row["image_id"] not in splits]
    rows += [{"image_id": name, "split": split} for name, split in splits.items()]
    with tempfile.TemporaryDirectory(dir=root, prefix=".") as folder:
        partial = Path(folder) / path.name
        with partial.open("w", encoding="utf-8-sig", newline="") as file:
            writer = csv.DictWriter(file, columns, delimiter=";")
            writer.writeheader()
            writer.writerows(rows)
        os.replace(partial, path)


def load_case(
    case: Case, *, classes: ClassMap = V2, kept: ClassMap | None = None
) -> Sample:
    """Read the CT and the labels of a case, reoriented to RAS.

    Masks are merged in the order of the class map; where they overlap, the later class
    wins, as in TotalSegmentator's own converter. Masks of classes that are not kept
    take part as background, if they are there.

    Args:
        case: its files.
        classes: that the files hold.
        kept: a subset of these, if others are to become background.

    Raises:
        UserError: as `nifti.load_ct`; for a missing mask, a mask of no known class, and
            labels that do not lie on the CT's voxel grid.
    """
    ct, overlapping = nifti.load_ct(case.ct), 0
    kept = kept or classes
    if CLASS in str(case.segmentation):
        label, overlapping = _merge_masks(case.segmentation, ct, classes, kept)
    else:
        label = nifti.load_labels(case.segmentation, classes=classes, on=ct).array
        if kept != classes:
            ids = {name: i for i, name in enumerate(kept.names)}
            table = [ids.get(name, 0) for name in classes.names]
            label = np.array(table, np.uint8)[label]
    return Sample(
        ct.array,
        label,
        ct.affine,
        case.name,
        overlapping,
        ct.source_shape,
        ct.source_affine,
        ct.notes,
    )


def _merge_masks(
    masks: Path, ct: nifti.Volume, classes: ClassMap, kept: ClassMap
) -> tuple[np.ndarray, int]:
    """Return the labels, and how often a mask claims a voxel that is labelled."""
    wanted, first, last = classes.names[1:], *str(masks).split(CLASS)
    names = [str(p).removeprefix(first).removesuffix(last) for p in _files(masks)]
    for name in names:
        checks.require(
            name in wanted,
            f"{first}{name}{last} belongs to none of the {len(wanted)} classes of "
            f"{_title(classes)}.{checks.did_you_mean(name, wanted)}",
        )
    missing = [name for name in kept.names[1:] if name not in names]
    checks.require(
        not missing,
        f"{masks.parent} lacks {len(missing)} of {len(kept.names) - 1} masks: "
        f"{', '.join(missing[:5])}{', ...' if len(missing) > 5 else ''}; an absent "
        "structure needs an empty mask, so download the case again.",
    )
    ids = {name: i for i, name in enumerate(kept.names)}
    label, claimed = None, 0
    start = wanted.index(kept.names[1])  # background on background changes nothing
    for name in (name for name in wanted[start:] if name in names):
        mask = nifti.load_mask(f"{first}{name}{last}", on=ct).array
        label, again = nifti.merge(label, mask, ids.get(name, 0))
        claimed += again
    return np.ascontiguousarray(label), claimed


def _title(classes):
    if classes == V2:
        return f"TotalSegmentator {labels.VERSION} ({labels.RECORD})"
    return "the dataset"


def _files(masks: Path) -> list[Path]:
    """Return the files of all masks of a case, sorted."""
    first, last = str(masks).split(CLASS)
    return sorted(
        Path(file) for file in glob.glob(f"{glob.escape(first)}*{glob.escape(last)}")
    )


def file_sizes(case: Case) -> list[int]:
    """Return the bytes of a case's files: its fingerprint."""
    found = case.segmentation
    files = _files(found) if CLASS in str(found) else [found]
    return [file.stat().st_size for file in (case.ct, *files)]


def case_of(root: Path, name: str, split: str) -> Case:
    """Return one case; a `UserError` if a file of it is missing."""
    folder = root / name
    ct = folder / f"ct{SUFFIX}"
    checks.require(
        ct.is_file(),
        f"{ct} does not exist, but meta.csv lists case {name!r}; finish the download "
        "or remove its line.",
    )
    masks = folder / "segmentations"
    for found, segmentation in (
        (folder / f"segmentations{SUFFIX}",) * 2,
        (masks, masks / f"{CLASS}{SUFFIX}"),
    ):
        if found.exists():
            return Case(name, ct, split, segmentation)
    raise checks.UserError(
        f"case {name!r} has neither {folder / 'segmentations'} with the 117 masks nor "
        f"segmentations{SUFFIX}; finish the download or remove its line from meta.csv."
    )


def require_files(case: Case) -> Case:
    """Return a case whose image and labels are there, or else raise `UserError`."""
    masks = CLASS in str(case.segmentation)
    for what, file in (("image", case.ct), ("labels", case.segmentation)):
        checks.require(
            file.is_file() or (what == "labels" and masks),
            f"the {what} of the case {case.name!r}, {file}, do not exist; finish the "
            "download or remove the case from the splits.",
        )
    return case
