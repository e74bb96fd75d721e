"""Evaluate label maps in files, of this or any other tool, on the same footing."""

import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from tqdm import tqdm

from swinsmt_jax import checks, labels
from swinsmt_jax.class_map import ClassMap
from swinsmt_jax.data import nifti, totalsegmentator
from swinsmt_jax.data.dataset import open_dataset
from swinsmt_jax.data.totalsegmentator import Case
from swinsmt_jax.evaluation import pictures, report
from swinsmt_jax.evaluation.run import Segmented, SurfaceRule, score

HU_RANGE = (-1024.0, 1024.0)  # of the picture
SUFFIXES = (".nii.gz", ".nii")


def evaluate_predictions(
    folder: Path,
    *,
    root: str | Path,
    split: str,
    rule: str,
    output: Path,
    groups: str | Path | None = None,
    description: str = "",
    limit: int = 0,
    surface_rule: SurfaceRule | None = None,
) -> str:
    """Compare label files with the truth, write all results, and return the Dice table.

    Args:
        folder: holds <case>.nii.gz or <case>.nii with label ids on the CT's grid.
        root: of the dataset with the truth.
        groups: JSON file as in `labels.load_groups`; None takes the dataset's.
        description: of the dataset, as in `dataset.open_dataset`.
        split, rule, output, limit, surface_rule: as in `report.evaluate_split`.

    Raises:
        UserError: for a prediction that is missing, lies on another grid or holds other
            ids, and as `report.evaluate_split`.
    """
    checks.in_range("limit", limit, 0, 10**9)
    dataset = open_dataset(root, description=description)
    for reason in dataset.refused.values():
        raise checks.UserError(reason)
    names = [name for name, own in dataset.splits.items() if own == split]
    checks.require(bool(names), f"{root} has no case of the split {split!r}.")
    cases = [dataset.find(name, split) for name in names[: limit or None]]
    classes = dataset.classes
    if groups:
        groups = labels.load_groups(groups, names=classes.names)
    files = [_file(folder, case) for case in cases]
    report.make_folder(output)
    results, views = [], []
    for segmented in _read(cases, files, classes, surface_rule):
        results.append(segmented.result)
        views.append(pictures.views_of(segmented))
    about = {"split": split, "predictions": str(folder), "data_root": str(root)}
    about |= report.about_surfaces(surface_rule)
    return report.write_results(
        output,
        results,
        views,
        groups=groups or classes.groups,
        rule=rule,
        about=about,
        title=f"{len(results)} cases of the split {split!r}, predictions in {folder}",
        names=classes.names,
        num_classes=classes.num_classes,
        hu_range=HU_RANGE,
    )


def _read(
    cases: Sequence[Case],
    files: Sequence[Path],
    classes: ClassMap,
    surface_rule: SurfaceRule | None,
) -> Iterator[Segmented]:
    bar = tqdm(
        zip(cases, files, strict=True), "evaluating", total=len(cases), unit="case"
    )
    for case, file in bar:
        start = time.perf_counter()
        truth = totalsegmentator.load_case(case, classes=classes)
        prediction = nifti.load_labels(file, classes=classes)
        nifti.require_same_grid(prediction, nifti.load_ct(case.ct))
        spacing = nifti.spacing_of(truth.affine)
        result = score(
            case.name,
            prediction.array,
            truth.label,
            seconds=time.perf_counter() - start,
            spacing=spacing,
            num_classes=classes.num_classes,
            surface_rule=surface_rule,
        )
        low, high = HU_RANGE
        yield Segmented(
            result,
            ((truth.image - low) / (high - low)).clip(0, 1).astype("f4"),
            truth.label,
            prediction.array,
            spacing,
        )


def _file(folder: Path, case: Case) -> Path:
    for suffix in SUFFIXES:
        if (folder / f"{case.name}{suffix}").is_file():
            return folder / f"{case.name}{suffix}"
    raise checks.UserError(
        f"{folder} has no prediction of case {case.name!r}: neither {case.name}.nii.gz "
        f"nor {case.name}.nii. Predict it, or evaluate fewer cases with --limit."
    )
