"""Evaluate label maps in files, of this or any other tool, on the same footing."""

import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from tqdm import tqdm

from swinsmt_jax import checks, labels, metrics
from swinsmt_jax.data import nifti, totalsegmentator
from swinsmt_jax.data.totalsegmentator import Case
from swinsmt_jax.evaluation import pictures, report
from swinsmt_jax.evaluation.run import CaseResult, Segmented

HU_RANGE = (-1024.0, 1024.0)  # of the picture
SUFFIXES = (".nii.gz", ".nii")


def evaluate_predictions(
    folder: Path,
    *,
    root: str | Path,
    split: str,
    groups: Mapping[str, Sequence[int]],
    rule: str,
    output: Path,
    limit: int = 0,
) -> str:
    """Compare label files with the truth, write all results, and return the Dice table.

    Args:
        folder: holds <case>.nii.gz or <case>.nii with label ids on the CT's grid.
        root: of the dataset with the truth, in the TotalSegmentator-V2 layout.
        split, groups, rule, output, limit: as in `report.evaluate_split`.

    Raises:
        UserError: for a prediction that is missing, lies on another grid or holds other
            ids, and as `report.evaluate_split`.
    """
    checks.in_range("limit", limit, 0, 10**9)
    cases = totalsegmentator.find_cases(root, split=split)[: limit or None]
    files = [_file(folder, case) for case in cases]
    report.make_folder(output)
    results, views = [], []
    for segmented in _read(cases, files):
        results.append(segmented.result)
        views.append(pictures.views_of(segmented))
    about = {"split": split, "predictions": str(folder), "data_root": str(root)}
    return report.write_results(
        output,
        results,
        views,
        groups=groups,
        rule=rule,
        about=about,
        title=f"{len(results)} cases of the split {split!r}, predictions in {folder}",
        num_classes=labels.NUM_CLASSES,
        hu_range=HU_RANGE,
    )


def _read(cases: Sequence[Case], files: Sequence[Path]) -> Iterator[Segmented]:
    bar = tqdm(
        zip(cases, files, strict=True), "evaluating", total=len(cases), unit="case"
    )
    for case, file in bar:
        start = time.perf_counter()
        truth = totalsegmentator.load_case(case)
        prediction = nifti.load_labels(file)
        nifti.require_same_grid(prediction, nifti.load_ct(case.ct))
        counts = metrics.overlap_counts(
            prediction.array, truth.label, num_classes=labels.NUM_CLASSES
        )
        seconds = time.perf_counter() - start
        low, high = HU_RANGE
        yield Segmented(
            CaseResult(case.name, counts, seconds),
            ((truth.image - low) / (high - low)).clip(0, 1).astype("f4"),
            truth.label,
            prediction.array,
            nifti.spacing_of(truth.affine),
        )


def _file(folder: Path, case: Case) -> Path:
    for suffix in SUFFIXES:
        if (folder / f"{case.name}{suffix}").is_file():
            return folder / f"{case.name}{suffix}"
    raise checks.UserError(
        f"{folder} has no prediction of case {case.name!r}: neither {case.name}.nii.gz "
        f"nor {case.name}.nii. Predict it, or evaluate fewer cases with --limit."
    )
