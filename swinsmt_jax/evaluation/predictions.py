"""Evaluate label maps in files, of this or any other tool, on the same footing."""

import math
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import loky

from swinsmt_jax import checks, class_map, labels
from swinsmt_jax.data import nifti, nifti_file, pipeline
from swinsmt_jax.data.case import Case
from swinsmt_jax.data.label_files import load_prediction, load_regridded, masks_in
from swinsmt_jax.data.store import StoredCase
from swinsmt_jax.evaluation import kept, published_results
from swinsmt_jax.evaluation.looks import Looks
from swinsmt_jax.evaluation.metrics import chosen_metrics
from swinsmt_jax.evaluation.pictures import views_of
from swinsmt_jax.evaluation.results import about_metrics, write_results
from swinsmt_jax.evaluation.scoring import Evaluation, score
from swinsmt_jax.evaluation.surface import SurfaceRule

MOST_WORKERS = 8  # unless told otherwise: each holds a whole case in memory


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
    metrics: Sequence[str] | None = None,
    surface_rule: SurfaceRule | None = None,
    protocol: str | None = None,
    regrid: bool = False,
    workers: int = 0,
    looks: Looks = Looks(),  # noqa: B008
    dask: str = "",
) -> str:
    """Compare label files with the truth, write all results, and return the Dice table.

    Args:
        folder: holds what `load_prediction` reads for each case: <case>.nii.gz,
            <case>.nii, or the folder <case> with a mask for each class.
        root: of the dataset with the truth, or of a store.
        groups: JSON file as in `labels.load_groups`; None takes the dataset's.
        description: of the dataset, as in `dataset.open_dataset`.
        split, rule, output, limit: as in `evaluate_split.evaluate_split`.
        metrics, surface_rule, protocol: as in `metrics.chosen_metrics`.
        regrid: resample predictions that lie on another grid, and say so in the table
            and in results.json.
        workers: processes that share the cases; 0 takes one for each CPU core, up to
            `MOST_WORKERS`. Cores that are left measure surfaces.
        looks: what is requested besides scores; label files have no confidence.
        dask: address of a Dask scheduler, whose workers do it instead of processes.

    Raises:
        SomeFailedError: after all cases, for a prediction that lies on another grid or
            holds other ids, and as `evaluate_split.evaluate_split`.
        UserError: for a prediction that is missing.
    """
    checks.in_range("limit", limit, 0, 10**9)
    checks.in_range("workers", workers, 0, 1024)
    looks.require()
    checks.require(
        not looks.confidence,
        "--confidence is requested, but label files contain no probabilities; "
        "evaluate the network itself, by --workdir or --nnunet.",
    )
    chosen = chosen_metrics(metrics, surface_rule=surface_rule, protocol=protocol)
    cases, classes = pipeline.open_data(root, split=split, description=description)
    cases = cases[: limit or None]
    grouped = classes.groups
    if groups:
        grouped = labels.load_groups(groups, names=classes.names)
    for case in cases:
        _file(folder, case)  # before the work, say which one is missing
    how = about_metrics(chosen, surface_rule=surface_rule, protocol=protocol)
    decides = [class_map.to_json(classes), how, repr(surface_rule), regrid]
    decides += [looks.decides] if looks.decides else []
    so_far = kept.Kept(output, kept.key_of(decides))
    so_far.begin()
    cores = loky.cpu_count()
    workers = min(len(cases), workers or min(cores, MOST_WORKERS))
    evaluate = partial(
        _evaluate,
        so_far=so_far,
        folder=folder,
        classes=classes,
        metrics=chosen,
        surface_rule=surface_rule,
        regrid=regrid,
        threads=max(1, cores // workers),
        looks=looks,
    )
    found = kept.outcomes(
        evaluate, cases, title="evaluating", workers=workers, dask=dask, folder=output
    )
    results, views = kept.scores_of(found)
    moved = {result.name: result.note for result in results if result.note}
    about = {"split": split, "predictions": str(folder), "data_root": str(root)}
    about |= how | {"regridded": moved}
    lines = [f"  {name}: {note}" for name, note in moved.items()]
    if moved:
        lines.insert(0, f"Resampled (nearest) from another grid: {len(moved)} cases.")
    table = write_results(
        output,
        Evaluation(results, grouped, rule, classes.names),
        views,
        about=about,
        title=f"{len(results)} cases of the split {split!r}, predictions in {folder}",
        note="\n".join(lines),
        pages=looks.pages(output, cases, views, classes.names),
        reported=published_results.are_of(root, [case.name for case in cases]),
    )
    so_far.end()
    return table


def _evaluate(case, *, so_far, folder, looks, **options):
    """Return the outcome of a case."""
    path = _file(folder, case)
    predicted = list(masks_in(path).values()) if path.is_dir() else [path]
    look = partial(looks.at, output=so_far.output, usual_ml={})
    score = partial(_score, path=path, look=look, **options)
    return so_far.outcome(case, [*case.files, *predicted], score)


def _score(case, *, path, classes, metrics, surface_rule, regrid, threads, look):
    """Return result and views of a case."""
    truth = case.read()
    if truth.source_affine is None:  # of a store, on whose grid the prediction lies
        shape = truth.image.shape
        truth = replace(truth, source_affine=truth.affine, source_shape=shape)
    scan = nifti.Volume(
        truth.image,
        truth.affine,
        truth.source_affine,
        truth.source_shape,
        case.files[0],
    )
    note = ""
    if regrid:
        prediction, note = load_regridded(path, classes=classes, like=scan)
    else:
        prediction = load_prediction(path, classes=classes, like=scan)
    case = score(
        truth,
        prediction,
        seconds=math.nan,
        num_classes=classes.num_classes,
        metrics=metrics,
        surface_rule=surface_rule,
        workers=threads,
    )
    return replace(look(case, classes.names), note=note), views_of(case)


def _file(folder: Path, case: Case | StoredCase) -> Path:
    """Find a prediction, named after the case, or its image as `predict.py` does."""
    image = nifti_file.stem(case.files[0])
    names = [case.name, *([image] if image.startswith(case.name) else [])]
    found = {nifti_file.stem(file): file for file in nifti_file.files_in(folder)}
    for name in names:
        if name in found:
            return found[name]
        if (folder / name).is_dir():
            return folder / name
    raise checks.UserError(
        f"{folder} has no prediction of case {case.name!r}: no {case.name}.nii.gz, "
        f"{case.name}.nii or folder {case.name} of masks. Predict it, or evaluate "
        "fewer cases with --limit."
    )
