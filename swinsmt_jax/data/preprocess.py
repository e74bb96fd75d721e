"""From a dataset as it downloads to a store: every case once, in parallel.

A run can be killed and started again: finished cases stay, half-written ones are made
again. A case that cannot be used is reported by name and reason, and the others go on.
"""

import functools
import shutil
import time
import warnings
from collections.abc import Sequence
from pathlib import Path

from absl import logging
from tqdm import tqdm

from swinsmt_jax import checks
from swinsmt_jax.class_map import ClassMap
from swinsmt_jax.data import meta, store
from swinsmt_jax.data.case import Case, load_case, lost_note, resampled
from swinsmt_jax.data.dataset import open_dataset
from swinsmt_jax.data.resampling import LABEL_RULES
from swinsmt_jax.data.store import Options
from swinsmt_jax.runtime import files
from swinsmt_jax.runtime.workers import WorkerDiedError, run_each

BAR = "{desc}: {percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}"


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
    verify: bool = False,
    label_resampling: str = "most",
) -> dict[str, str]:
    """Write the cases of a dataset to a store.

    Args:
        source: folder of the dataset.
        root: folder of the store; made, or continued.
        spacing: voxel side in mm; 0 keeps each scan's own.
        description: of the dataset, as in `dataset.open_dataset`.
        classes: names of those to keep; empty keeps all.
        workers: processes, each of which holds one scan; one is this process itself.
        exclude: ids of cases to leave out, such as those with known wrong labels.
        progress: show a bar.
        verify: read finished cases whole; those that are damaged are made again.
        label_resampling: one of `resampling.LABEL_RULES`.

    Returns:
        {case: reason} of those that failed, or {line of meta.csv: reason} where a line
        names no case; also in the index of the store.

    Raises:
        UserError: for a source that is not such a dataset, unknown ids in `exclude` or
            names in `classes`, a store of other options, that another run is writing
            to, or that cannot be written, such as on a full disk. Finished cases stay,
            half-written ones do not.
    """
    source, root = files.absolute(source), files.absolute(root)
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
    checks.one_of("label_resampling", label_resampling, LABEL_RULES)
    options = Options(spacing, kept, label_resampling)
    with files.writable(root), store.opened(root, options):
        _list_cases(root, rows)
        waiting = [name for name in rows if not _is_finished(root / name, verify)]
        job = functools.partial(write, root, options=options, classes=found.classes)
        start = time.monotonic()
        failed = _run(job, found, waiting, rows, workers, progress)
        for name in waiting:
            lost = {} if name in failed else store.read_json(root / name / store.CASE)
            if lost.get("lost"):
                logging.warning("%s", lost_note(name, lost["lost"]))
        written = len(waiting) - len(failed)
        index = {
            **{"format": store.FORMAT, "options": options.to_json()},
            **{"failed": refused | failed, "excluded": list(exclude)},
            "run": {"cases": written, "seconds": time.monotonic() - start},
        }
        files.write_json(root / store.INDEX, index)
    return index["failed"]


def _is_finished(folder, verify):
    if not folder.exists():
        return False
    damage = store.damage(folder, whole=verify)
    if damage:
        logging.warning("%s is made again: %s", folder.name, damage)
    return damage is None


def _run(job, dataset, waiting, rows, workers, progress):
    """Write the cases that are not there; return {case: reason} of failures."""
    failed, cases, start = {}, [], time.monotonic()
    bar = tqdm(
        total=len(rows),
        initial=len(rows) - len(waiting),
        desc="preprocessing",
        bar_format=BAR + "{postfix}]",
        disable=not progress,
        dynamic_ncols=True,
    )

    def end(name, reason):
        if reason:
            failed[name] = reason
            bar.write(f"{name} is left out: {reason}")
        bar.update()

    with bar:
        for name in waiting:
            try:
                cases.append(dataset.find(name, rows[name]))
            except Exception as error:
                end(name, _reason(error))
        finished = run_each(job, cases, workers=workers)
        for count, (case, future) in enumerate(finished, start=1):
            bar.set_postfix_str(rate(count, time.monotonic() - start), refresh=False)
            try:
                end(case.name, future.result())
            except WorkerDiedError as error:
                end(case.name, str(error))
    return {name: failed[name] for name in rows if name in failed}


def rate(cases: int, seconds: float) -> str:
    """Return cases a second in words; a minute, if they are slow."""
    found = cases / max(seconds, 1e-3)
    return f"{found:.1f} cases/s" if found >= 1 else f"{60 * found:.1f} cases/minute"


def write(root: Path, case: Case, *, options: Options, classes: ClassMap) -> str | None:
    """Write one case, whose files hold `classes`; return the reason if it is unusable.

    Whatever goes wrong with a case is its reason, such as memory that it lacks.

    Raises:
        UserError: if the store cannot be written, which no other case would mend.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what matters is checked
            sample = load_case(case, classes=classes, kept=options.classes)
        facts = {
            "name": case.name,
            "source_shape": sample.source_shape,
            "source_affine": sample.source_affine.tolist(),
            "overlapping_voxels": sample.overlapping,
            "notes": sample.notes,
            "source": case.facts,
        }
        sample = resampled(sample, options.spacing, rule=options.label_resampling)
        facts["lost"] = sample.lost(options.classes.names)
    except Exception as error:
        return _reason(error)
    try:
        number = options.classes.num_classes
        store.write_case(root, sample, num_classes=number, facts=facts)
    except (OSError, ValueError) as error:  # tensorstore's are ValueErrors
        raise checks.UserError(
            f"case {case.name!r} cannot be written to the store {root}: "
            f"{' '.join(str(error).split())[:600]}; make room or mend its permissions, "
            "and give the same command again: finished cases stay."
        ) from error
    except Exception as error:
        return _reason(error)
    return None


def _reason(error):
    if isinstance(error, checks.UserError):
        return str(error)
    return f"{type(error).__name__}: {' '.join(str(error).split())[:600]}"


def _list_cases(root, rows):
    """Make the store's meta.csv; remove what it no longer lists."""
    file = root / meta.META
    if file.exists():
        for name in meta.read(root).keys() - rows.keys():
            shutil.rmtree(root / name, ignore_errors=True)
        file.unlink()
    meta.add(root, rows)
