"""From a dataset as it downloads to a store: every case once, in parallel.

A run can be killed and started again: finished cases stay, half-written ones are made
anew. A case that cannot be used is reported by name and reason, and the others go on.
"""

import concurrent.futures
import functools
import multiprocessing
import shutil
import warnings
from collections.abc import Sequence
from concurrent.futures.process import BrokenProcessPool
from dataclasses import replace
from pathlib import Path

from tqdm import tqdm

from swinsmt_jax import checks
from swinsmt_jax.class_map import ClassMap
from swinsmt_jax.data import nifti, store, totalsegmentator
from swinsmt_jax.data.dataset import open_dataset
from swinsmt_jax.data.store import Options
from swinsmt_jax.data.totalsegmentator import Case


def preprocess(
    source: str | Path,
    root: str | Path,
    *,
    spacing: float = 0.0,
    description: str = "",
    classes: Sequence[str] = (),
    workers: int = 1,
    exclude: Sequence[str] = (),
    progress: bool = False,
) -> dict[str, str]:
    """Write the cases of a dataset to a store.

    Args:
        source: folder of the dataset.
        root: folder of the store; made, or continued.
        spacing: voxel side in mm; 0 keeps each scan's own.
        description: of the dataset, as in `dataset.open_dataset`.
        classes: names of those to keep; empty keeps all.
        workers: processes; each holds one scan.
        exclude: ids of cases to leave out, such as those with known wrong labels.
        progress: show a bar.

    Returns:
        {case: reason} of those that failed, or {line of meta.csv: reason} where a line
        names no case; also in the index of the store.

    Raises:
        UserError: for a source that is no such dataset, unknown ids in `exclude` or
            names in `classes`, a store of other options or that cannot be written, such
            as on a full disk, and worker processes that die. Finished cases stay,
            half-written ones do not.
    """
    source, root = Path(source), Path(root)
    checks.positive("workers", workers)
    found = open_dataset(source, description=description)
    for name in exclude:
        checks.require(
            name in found.splits or name in found.refused,
            f"exclude names {name!r}, which {source} does not list."
            f"{checks.did_you_mean(name, found.splits)}",
        )
    rows = {name: split for name, split in found.splits.items() if name not in exclude}
    refused = {name: why for name, why in found.refused.items() if name not in exclude}
    kept = found.classes.subset(classes) if classes else found.classes
    options = Options(spacing, kept)
    try:
        store.open_store(root, options)
        _list_cases(root, rows)
        waiting = [name for name in rows if not (root / name / store.CASE).is_file()]
        job = functools.partial(write, root, options=options, classes=found.classes)
        failed = refused | _run(job, found, waiting, rows, workers, progress)
        index = {"format": store.FORMAT, "options": options.to_json()}
        index["failed"] = failed
        store.write_json(root / store.INDEX, index)
    except OSError as error:
        raise checks.UserError(
            f"the store {root} cannot be written: {error}; make room or mend its "
            "permissions, and give the same command again."
        ) from error
    return failed


def _run(write_one, dataset, waiting, rows, workers, progress):
    """Write the cases that are not there; return {case: reason} of failures."""
    failed, cases, total = {}, [], len(rows)
    for name in waiting:
        try:
            cases.append(dataset.find(name, rows[name]))
        except checks.UserError as error:
            failed[name] = str(error)
    bar = tqdm(
        total=total,
        initial=total - len(waiting),
        desc="preprocessing",
        unit="case",
        disable=not progress,
        dynamic_ncols=True,
    )
    context = multiprocessing.get_context("spawn")
    with bar, concurrent.futures.ProcessPoolExecutor(workers, context) as pool:
        for name, reason in failed.items():
            bar.write(f"{name} is left out: {reason}")
            bar.update()
        jobs = {pool.submit(write_one, case): case.name for case in cases}
        try:
            for job in concurrent.futures.as_completed(jobs):
                reason = job.result()
                if reason:
                    failed[jobs[job]] = reason
                    bar.write(f"{jobs[job]} is left out: {reason}")
                bar.update()
        except BrokenProcessPool as error:
            raise checks.UserError(
                "a worker process has died, mostly because memory ran out: give fewer "
                "--workers, and the same command again; finished cases stay."
            ) from error
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    return {name: failed[name] for name in rows if name in failed}


def write(root: Path, case: Case, *, options: Options, classes: ClassMap) -> str | None:
    """Write one case, whose files hold `classes`; return the reason if it is unusable.

    Raises:
        UserError: if the store cannot be written, which no other case would mend.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what matters is checked
            sample = totalsegmentator.load_case(
                case, classes=classes, kept=options.classes
            )
        facts = {
            "name": case.name,
            "source_shape": sample.source_shape,
            "source_affine": sample.source_affine.tolist(),
            "overlapping_voxels": sample.overlapping,
            "source": totalsegmentator.file_sizes(case),
        }
        sample = resampled(sample, options.spacing)
    except checks.UserError as error:
        return str(error)
    try:
        number = options.classes.num_classes
        store.write_case(root, sample, num_classes=number, facts=facts)
    except (OSError, ValueError) as error:  # tensorstore's are ValueErrors
        raise checks.UserError(
            f"case {case.name!r} cannot be written to the store {root}: "
            f"{' '.join(str(error).split())[:600]}; make room or mend its permissions, "
            "and give the same command again: finished cases stay."
        ) from error
    return None


def resampled(sample: totalsegmentator.Sample, spacing: float):
    """Return a sample of cubic voxels: the CT linear and smoothed, labels nearest."""
    if spacing == 0:
        return sample
    image, affine = nifti.resample(
        sample.image, sample.affine, spacing=spacing, order=1
    )
    label, _ = nifti.resample(sample.label, sample.affine, spacing=spacing, order=0)
    return replace(sample, image=image, label=label, affine=affine)


def _list_cases(root, rows):
    """Make the store's meta.csv; remove what it no longer lists."""
    file = root / "meta.csv"
    if file.exists():
        for name in totalsegmentator.read_meta(root).keys() - rows.keys():
            shutil.rmtree(root / name, ignore_errors=True)
        file.unlink()
    totalsegmentator.add_to_meta(root, rows)
