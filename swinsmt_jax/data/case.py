"""Cases of a dataset: where their files lie, and how CT and labels are read."""

import glob
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from swinsmt_jax import checks, labels
from swinsmt_jax.class_map import V2, ClassMap
from swinsmt_jax.data import nifti, resampling
from swinsmt_jax.data.sample import Sample

CLASS = "{class}"  # stands for the name of a class in the path of masks


@dataclass(frozen=True)
class Case:
    """One scan on disk; `segmentation` is one label file, or has `CLASS` in it."""

    name: str
    ct: Path
    split: str
    segmentation: Path
    modality: str = "CT"

    def read(self) -> Sample:
        """Read a scan of TotalSegmentator v2's classes; see `load_case`."""
        return load_case(self)

    @property
    def files(self) -> list[Path]:
        """Image and labels."""
        found = self.segmentation
        return [self.ct, *(_files(found, self.ct) if CLASS in str(found) else [found])]

    @property
    def facts(self) -> list[int]:
        """Bytes of the files: they tell one case from another."""
        return [file.stat().st_size for file in self.files]


@dataclass(frozen=True)
class Dataset:
    """A dataset on disk.

    Attributes:
        root: its folder.
        classes: of its label ids.
        splits: {case: split}.
        find: (case, split) to its files; a `UserError` if they are not there.
        refused: {case or line: reason} of entries that cannot be used.
    """

    root: Path
    classes: ClassMap
    splits: Mapping[str, str]
    find: Callable[[str, str], Case]
    refused: Mapping[str, str] = field(default_factory=dict)


def require_files(case: Case) -> Case:
    """Return a case whose image and labels are there, or else raise `UserError`."""
    masks = CLASS in str(case.segmentation)
    for what, does, file in (
        ("image", "does", case.ct),
        ("labels", "do", case.segmentation),
    ):
        checks.require(
            file.is_file() or (what == "labels" and masks),
            f"the {what} of the case {case.name!r}, {file}, {does} not exist; finish "
            "the download or remove the case from the splits.",
        )
    return case


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
    ct = nifti.load_ct(case.ct, modality=case.modality)
    overlapping, notes = 0, tuple[str, ...]()
    kept = kept or classes
    if CLASS in str(case.segmentation):
        label, overlapping, notes, voxels = _merge_masks(
            case.segmentation, ct, classes, kept
        )
    else:
        found = nifti.load_labels(case.segmentation, classes=classes, on=ct)
        label, notes = found.array, found.notes
        if kept != classes:
            ids = {name: i for i, name in enumerate(kept.names)}
            table = [ids.get(name, 0) for name in classes.names]
            label = np.array(table, np.uint8)[label]
        voxels = dict(enumerate(np.bincount(label.reshape(-1)).tolist()))
    return Sample(
        ct.array,
        label,
        ct.affine,
        case.name,
        overlapping,
        ct.source_shape,
        ct.source_affine,
        ct.notes + notes,
        voxels,
    )


def _merge_masks(
    masks: Path, ct: nifti.Volume, classes: ClassMap, kept: ClassMap
) -> nifti.Merged:
    wanted, first, last = classes.names[1:], *str(masks).split(CLASS)
    names = [
        str(p).removeprefix(first).removesuffix(last) for p in _files(masks, ct.path)
    ]
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
    start = wanted.index(kept.names[1])  # background on background changes nothing
    merged = [name for name in wanted[start:] if name in names]
    files = {f"{first}{name}{last}": ids.get(name, 0) for name in merged}
    return nifti.load_masks(files, on=ct)


def _title(classes):
    if classes == V2:
        return f"TotalSegmentator {labels.VERSION} ({labels.RECORD})"
    return "the dataset"


def lost_note(name: str, lost: Mapping[str, int]) -> str:
    """Say which classes have no voxel left of those that a case's files have."""
    classes = ", ".join(f"{own} ({number:,})" for own, number in lost.items())
    return (
        f"case {name!r} keeps no voxel of {len(lost)} classes that its files have: "
        f"{classes}. Thin structures need smaller voxels, or preprocess.py "
        "--label_resampling=keep_thin."
    )


def _files(masks: Path, image: Path) -> list[Path]:
    """Return the files of all masks of a case, sorted; its image may lie among them."""
    first, last = str(masks).split(CLASS)
    found = glob.glob(f"{glob.escape(first)}*{glob.escape(last)}")
    return sorted(Path(file) for file in found if Path(file) != image)


def resampled(sample: Sample, spacing: float, *, rule: str = "most") -> Sample:
    """Return a sample of cubic voxels of this side in mm; 0 keeps its own.

    Labels are resampled by `rule`, one of `resampling.LABEL_RULES`.
    """
    if spacing == 0:
        return sample
    image, affine = resampling.resample(
        sample.image, sample.affine, spacing=spacing, order=1
    )
    label, _ = resampling.resample(
        sample.label, sample.affine, spacing=spacing, order=0, rule=rule
    )
    return replace(sample, image=image, label=label, affine=affine)
