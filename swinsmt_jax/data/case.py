"""Cases of a dataset: places of their files, and readers of CT and labels."""

import glob
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from swinsmt_jax import checks, labels
from swinsmt_jax.class_map import V2, VERSIONS, ClassMap, class_key
from swinsmt_jax.data import meta, nifti, resampling
from swinsmt_jax.data.folds import Fold
from swinsmt_jax.data.sample import Sample
from swinsmt_jax.data.spacing import Sides

CLASS = "{class}"  # stands for the name of a class in the path of masks


@dataclass(frozen=True)
class Case:
    """One scan on disk; `segmentation` is a label file, or a path with `CLASS`.

    Attributes:
        classes: in its files.
        absent: whether a missing mask means an absent structure.
        unmasked: whether a missing mask means a class that is not annotated.
        annotated: names of the classes that are annotated; None for all.
        ignored: value in a label file of voxels that are not annotated.
    """

    name: str
    ct: Path
    split: str
    segmentation: Path
    modality: str = "CT"
    classes: ClassMap = V2
    absent: bool = False
    unmasked: bool = False
    annotated: tuple[str, ...] | None = None
    ignored: int | None = None

    @property
    def is_partial(self) -> bool:
        """Whether some classes or voxels may not be annotated."""
        told = self.annotated is not None or self.ignored is not None
        return told or (self.unmasked and CLASS in str(self.segmentation))

    def annotates(self, kept: ClassMap | None = None) -> tuple[int, ...] | None:
        """Return the label ids of the classes that are annotated; None for all.

        Args:
            kept: the classes with ids, if not all.
        """
        names = self.annotated
        if names is None and self.is_partial and self.ignored is None:
            first, last = str(self.segmentation).split(CLASS)
            files = map(str, _files(self.segmentation, self.ct))
            names = tuple(f.removeprefix(first).removesuffix(last) for f in files)
        if names is None:
            return None
        keys = {class_key(name) for name in names}
        own = [*enumerate((kept or self.classes).names)][1:]
        found = tuple(number for number, name in own if class_key(name) in keys)
        return None if len(found) == len(own) else found

    def read(self) -> Sample:
        """Read scan and labels; see `load_case`."""
        return load_case(self)

    @property
    def sides(self) -> tuple[float, float, float]:
        """Sides of the scan's voxels in mm, to the right, front and head."""
        return nifti.grid_of(self.ct).spacing

    @property
    def files(self) -> list[Path]:
        """Image and labels."""
        found = self.segmentation
        return [self.ct, *(_files(found, self.ct) if CLASS in str(found) else [found])]

    @property
    def facts(self) -> list:
        """File sizes and annotated classes, which tell cases apart."""
        sizes = [file.stat().st_size for file in self.files]
        return sizes if self.annotated is None else [*sizes, list(self.annotated)]


@dataclass(frozen=True)
class Dataset:
    """A dataset on disk.

    Attributes:
        root: its folder.
        classes: of its label ids.
        splits: {case: split}.
        find: from (case, split) to its files; raises `UserError` if they are missing.
        refused: {case or line: reason} of unusable entries.
        folds: of a cross-validation, if listed; see `folds.splits_of`.
    """

    root: Path
    classes: ClassMap
    splits: Mapping[str, str]
    find: Callable[[str, str], Case]
    refused: Mapping[str, str] = field(default_factory=dict)
    folds: Sequence[Fold] = ()

    def case(self, name: str, split: str) -> Case:
        """Return a case with its classes; raise `UserError` if files are missing."""
        return replace(self.find(name, split), classes=self.classes)

    def of_split(
        self, split: str, *, splits: Mapping[str, str] | None = None
    ) -> tuple[Case, ...]:
        """Return the cases of a split, in the dataset's order.

        Args:
            split: "train", "val" or "test".
            splits: {case: split}, if not the dataset's own.

        Raises:
            UserError: for an unusable entry, and an empty split.
        """
        checks.one_of("split", split, meta.SPLITS)
        for reason in self.refused.values():
            raise checks.UserError(reason)
        splits = self.splits if splits is None else splits
        names = [name for name, own in splits.items() if own == split]
        counts = Counter(splits.values())
        if not names:
            has = ", ".join(f"{counts[s]} of {s!r}" for s in meta.SPLITS)
            raise meta.EmptySplitError(
                f"{self.root} lists no case of the split {split!r}; it has {has}."
            )
        return tuple(self.case(name, split) for name in names)


def require_files(case: Case) -> Case:
    """Return a case; raise `UserError` if its image or labels are missing."""
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
    case: Case,
    *,
    classes: ClassMap | None = None,
    kept: ClassMap | None = None,
    overlaps: str = "order",
) -> Sample:
    """Read the CT and the labels of a case, reoriented to RAS.

    Masks are merged in the order of the class map. Where they overlap, the later class
    wins, as in TotalSegmentator's own converter, unless `overlaps` says otherwise.
    Existing masks of classes that are not kept take part as background. Labels of
    classes that are not annotated are background too.

    Args:
        case: its files.
        classes: in the files, if not `case.classes`.
        kept: a subset of these, if others should become background.
        overlaps: one of `nifti.OVERLAPS`.

    Raises:
        UserError: as `nifti.load_ct`; for a missing mask unless `case.absent` or its
            class is not annotated, no mask at all, and labels off the CT's grid.
    """
    ct = nifti.load_ct(case.ct, modality=case.modality)
    overlapping, notes = 0, tuple[str, ...]()
    absent: list[str] = []
    classes = classes or case.classes
    kept = kept or classes
    annotated = case.annotates(kept)
    if CLASS in str(case.segmentation):
        merged, absent = _merge_masks(case, ct, classes, kept, overlaps)
        label, overlapping, notes, voxels = merged
    else:
        found = nifti.load_labels(
            case.segmentation, classes=classes, on=ct, ignored=case.ignored
        )
        label, notes = found.array, found.notes
        if kept != classes or annotated is not None:
            ids = {name: i for i, name in enumerate(kept.names)}
            table = np.zeros(256, np.uint8)
            for number, name in enumerate(classes.names):
                own = ids.get(name, 0)
                table[number] = own if annotated is None or own in annotated else 0
            table[labels.IGNORED] = labels.IGNORED
            label = table[label]
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
        tuple(absent),
        annotated,
    )


def _merge_masks(
    case: Case, ct: nifti.Volume, classes: ClassMap, kept: ClassMap, overlaps: str
) -> tuple[nifti.Merged, list[str]]:
    first, last = str(case.segmentation).split(CLASS)
    ids, found, foreign = classes.ids_by_key(), {}, []
    for file in map(str, _files(case.segmentation, ct.path)):
        name = file.removeprefix(first).removesuffix(last)
        number = ids.get(class_key(name), 0)
        if number:
            found[number] = file
        else:
            near = checks.did_you_mean(name, classes.names[1:])
            foreign.append(f"{file} is not a mask of any class and was skipped.{near}")
    checks.require(
        bool(found),
        f"{first}*{last} holds a mask of none of the {len(classes.names) - 1} classes "
        f"of {_title(classes)}: {checks.few(classes.names[1:])}.",
    )
    own = {
        number: kept.names.index(name) if name in kept.names else 0
        for number, name in enumerate(classes.names)
    }
    annotated = case.annotates(classes)
    if annotated is not None:
        found = {number: found[number] for number in annotated if number in found}
    wanted = [*range(len(classes.names))] if annotated is None else annotated
    missing = [classes.names[k] for k in wanted if own[k] and k not in found]
    checks.require(
        case.absent or not missing,
        f"{Path(first).parent if last else first} lacks {len(missing)} of "
        f"{len(kept.names) - 1} masks: {checks.few(missing)}; {_remedy(classes)}. "
        f"{' '.join(foreign[:3])}".rstrip(),
    )
    # In order, background on background changes nothing.
    start = min(number for number, new in own.items() if new)
    start = 0 if overlaps == "smaller" else start
    files = {f: own[k] for k, f in sorted(found.items()) if k >= start}
    if not files:  # no class that is kept is annotated
        empty = nifti.Merged(np.zeros(ct.array.shape, np.uint8), 0, tuple(foreign), {})
        return empty, missing
    merged = nifti.load_masks(files, on=ct, overlaps=overlaps)
    return merged._replace(notes=merged.notes + tuple(foreign)), missing


def _title(classes):
    if classes == V2:
        return f"TotalSegmentator {labels.VERSION} ({labels.RECORD})"
    return "the dataset"


def _remedy(classes):
    if classes in VERSIONS.values():
        return (
            f"an absent structure of {_title(classes)} has an empty mask, so download "
            "the case again"
        )
    return (
        'write empty masks for absent structures, or take "missing_masks": "refused" '
        "out of the description"
    )


def lost_note(name: str, lost: Mapping[str, int]) -> str:
    """Name the classes in a case's files that have no voxel left."""
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


def resampled(sample: Sample, spacing: Sides, *, rule: str = "most") -> Sample:
    """Resample to voxels with these sides in mm; 0 keeps the sample's own.

    `rule`, one of `resampling.LABEL_RULES`, resamples the labels.
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
