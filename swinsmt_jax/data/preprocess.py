"""From a downloaded dataset to a store: every case once, in parallel.

After a kill, start the run again: finished cases stay, and partial ones are redone. An
unusable case is reported with its reason, and the others continue.
"""

import functools
import shutil
import time
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from absl import logging
from tqdm import tqdm

from swinsmt_jax import checks
from swinsmt_jax.class_map import ClassMap
from swinsmt_jax.data import known_bad_cases, meta, origin, store
from swinsmt_jax.data.case import Case, Dataset, load_case, lost_note, resampled
from swinsmt_jax.data.dataset import open_dataset
from swinsmt_jax.data.nifti import OVERLAPS
from swinsmt_jax.data.resampling import LABEL_RULES
from swinsmt_jax.data.spacing import Sides
from swinsmt_jax.data.store import Options
from swinsmt_jax.runtime import files
from swinsmt_jax.runtime.cluster import run_each
from swinsmt_jax.runtime.workers import WorkerDiedError

BAR = "{desc}: {percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}"


def preprocess(
    source: str | Path,
    root: str | Path,
    *,
    spacing: Sides = 0.0,
    description: str = "",
    classes: Sequence[str] = (),
    workers: int = 1,
    exclude: Sequence[str] = (),
    progress: bool = False,
    verify: bool = False,
    label_resampling: str = "most",
    overlaps: str = "order",
    prune: bool = False,
    check: bool = False,
    dask: str = "",
) -> dict[str, str]:
    """Write the cases of a dataset to a store.

    Args:
        source: folder of the dataset.
        root: folder of the store; made, or continued.
        spacing: voxel side in mm, or three sides; 0 keeps each scan's own.
        description: of the dataset, as in `dataset.open_dataset`.
        classes: names of the classes to keep; empty keeps all.
        workers: processes, each with one scan in memory; one is this process itself.
        exclude: ids of cases to leave out; "known" means those in `known_bad_cases`.
        progress: show a bar.
        verify: read finished cases completely, and redo damaged ones.
        label_resampling: one of `resampling.LABEL_RULES`.
        overlaps: one of `nifti.OVERLAPS`; decides which mask wins where masks overlap.
        prune: remove stored cases that the source no longer lists, and let another
            source take the store.
        check: report the plan and do nothing.
        dask: address of a Dask scheduler, whose workers do it instead of processes.

    Returns:
        {case: reason} of failed cases, or {line of meta.csv: reason} if a line names no
        case; the store's index has them too.

    Raises:
        UserError: for a source that is not such a dataset, unknown ids in `exclude` or
            names in `classes`, and a store that has other options, is in use by another
            run, or cannot be written, such as on a full disk. Finished cases stay,
            partial ones do not.
    """
    source, root = files.absolute(source), files.absolute(root)
    checks.positive("workers", workers)
    found = open_dataset(source, description=description)
    if known_bad_cases.KNOWN in exclude and known_bad_cases.KNOWN not in found.splits:
        listed = {*found.splits, *found.refused}
        known = known_bad_cases.in_dataset(listed, found.classes)
        others = (name for name in exclude if name != known_bad_cases.KNOWN)
        exclude = [*dict.fromkeys([*others, *known])]
    for name in exclude:
        checks.require(
            name in found.splits or name in found.refused,
            f"exclude names {name!r}, which {source} does not list."
            f"{checks.did_you_mean(name, found.splits)}",
        )
    kept = found.classes.subset(classes) if classes else found.classes
    checks.one_of("label_resampling", label_resampling, LABEL_RULES)
    checks.one_of("overlaps", overlaps, OVERLAPS)
    options = Options(spacing, kept, label_resampling, overlaps)
    if check:
        print(plan(found, root, options, exclude, verify=verify, prune=prune))
        return {}
    with files.writable(root), store.opened(root, options):
        todo = plan(found, root, options, exclude, verify=verify, prune=prune)
        todo.log()
        _list_cases(root, todo)
        job = functools.partial(
            write, root, options=options, classes=found.classes, source=found.root
        )
        start = time.monotonic()
        failed = _run(job, found, todo, root, progress, workers=workers, dask=dask)
        done = [name for name in todo.waiting if name not in failed]
        facts = {name: store.read_json(root / name / store.CASE) for name in done}
        for name, own in facts.items():
            if own.get("lost"):
                logging.warning("%s", lost_note(name, own["lost"]))
        _tell_absent({name: own.get("absent") for name, own in facts.items()})
        _tell_partial(facts, options.classes)
        index = {
            **{"format": store.FORMAT, "options": options.to_json()},
            "source": {"root": str(source), "description": str(description)},
            "folds": list(found.folds),
            **{"failed": todo.refused | failed, "excluded": list(exclude)},
            "run": {"cases": len(done), "seconds": time.monotonic() - start},
        }
        files.write_json(root / store.INDEX, index)
        _tell_untrained(root, todo.rows, index["failed"], options.classes)
    return index["failed"]


def _tell_absent(absent):
    """Count the missing masks in one line."""
    found = [(name, own) for name, names in absent.items() for own in names or ()]
    if found:
        logging.warning(
            "%d masks of %d cases are missing and count as absent structures: %s",
            len(found),
            len({name for name, _ in found}),
            checks.few([f"{own} of {name}" for name, own in found]),
        )


def _tell_partial(facts, classes):
    """Count, for partly annotated classes, the cases that do not annotate them."""
    partial = [own["annotated"] for own in facts.values() if "annotated" in own]
    ignored = sum("ignored" in own for own in facts.values())
    without = {
        name: sum(number not in own for own in partial)
        for number, name in [*enumerate(classes.names)][1:]
    }
    if partial:
        logging.info(
            "%d of %d cases annotate only some classes; not annotated: %s",
            *(len(partial), len(facts)),
            checks.few([f"{name} in {n}" for name, n in without.items() if n]),
        )
    if ignored:
        logging.info("%d of %d cases have ignored voxels", ignored, len(facts))


def _tell_untrained(root, rows, failed, classes):
    """Warn of classes without any training case."""
    names = [n for n, split in rows.items() if split == "train" and n not in failed]
    counts = [store.read_json(root / name / store.CASE)["counts"] for name in names]
    seen = np.any(np.array(counts), axis=0) if counts else ()
    never = [classes.names[i] for i, some in enumerate(seen) if i and not some]
    if never:
        logging.warning(
            "%d classes are in no training case, so they cannot be learnt: %s",
            len(never),
            checks.few(never),
        )


@dataclass(frozen=True)
class Plan:
    """The plan of a preprocessing run, case by case.

    Attributes:
        rows: {case: split} of the store's new table.
        refused: {entry: reason} of unusable entries in the source.
        new: cases to make.
        again: {case: reason} of cases to redo.
        partial: cases that may annotate only some classes or voxels.
        gone: stored cases that the source no longer lists, or that are excluded.
        prune: whether to remove these.
    """

    rows: Mapping[str, str]
    refused: Mapping[str, str]
    new: Sequence[str]
    again: Mapping[str, str]
    partial: Sequence[str]
    gone: Sequence[str]
    prune: bool

    @property
    def waiting(self) -> list[str]:
        """The cases to write, in order."""
        return [n for n in self.rows if n in self.new or n in self.again]

    def log(self) -> None:
        """Log everything that is not simply new."""
        for line in self._lines():
            logging.warning("%s", line)

    def _lines(self):
        lines = [f"{name} is made again: {why}" for name, why in self.again.items()]
        if self.gone:
            fate = "is removed" if self.prune else "stays; --prune removes it"
            lines.append(
                f"{len(self.gone)} cases of the store are no longer listed, or are "
                f"excluded: {', '.join(self.gone)}. They are not used; what was made "
                f"of them {fate}"
            )
        return lines

    def __str__(self) -> str:
        """Describe the plan in lines."""
        same = len(self.rows) - len(self.waiting)
        lines = [f"{same} cases stay as they are"]
        if self.new:
            lines.append(f"{len(self.new)} cases are made: {', '.join(self.new)}")
        if self.partial:
            some = checks.few(self.partial)
            lines.append(f"{len(self.partial)} may be annotated in part: {some}")
        lines += self._lines()
        lines += [f"{name} is left out: {why}" for name, why in self.refused.items()]
        return "\n".join(lines)


def plan(
    found: Dataset,
    root: Path,
    options: Options,
    exclude: Sequence[str],
    *,
    verify: bool,
    prune: bool,
) -> Plan:
    """Compare a dataset with its cases in a store, without writing anything.

    Raises:
        UserError: for a store with other options and, unless `prune`, one from another
            source: another folder, other files or other cases.
    """
    rows = {name: split for name, split in found.splits.items() if name not in exclude}
    refused = {name: why for name, why in found.refused.items() if name not in exclude}
    made = meta.read(root) if (root / meta.META).is_file() else {}
    held = sorted(file.parent.name for file in root.glob(f"*/{store.CASE}"))
    gone = [name for name in held if name not in rows]
    there = {name for name in rows if (root / name).exists()}
    again, changed = {}, []
    before = store.read_json(root / store.INDEX).get("source", {}) if made else {}
    other = before.get("root") not in (None, str(found.root))
    if store.is_store(root):
        store.require_options(root, options)
    for name in rows:
        if name not in there:
            continue
        damage = store.damage(root / name, whole=verify)
        read = verify or other
        differing = (
            []
            if damage
            else _changes(found, root, name, rows[name], read, options.classes)
        )
        if damage or differing:
            changed += [name] if differing else []
            again[name] = damage or f"its files changed: {checks.few(differing)}"
    for strange, words in (
        (changed, "the same cases with other files"),
        ([] if there else gone, "none of its cases"),
    ):
        checks.require(
            prune or not (other and strange),
            f"the store {root} was made of {before.get('root')}, and {found.root} has "
            f"{words}: {checks.few(strange)}. Choose another --store; --prune gives "
            "this one to the new source.",
        )
    new = [name for name in rows if name not in there]
    partial = [name for name in rows if _is_partial(found, name, rows[name])]
    return Plan(rows, refused, new, again, partial, gone, prune)


def _is_partial(found, name, split):
    try:
        return found.find(name, split).is_partial
    except checks.UserError:  # which is told when its turn comes
        return False


def _changes(found, root, name, split, whole, kept):
    """Return the changed source files of a stored case."""
    made = root / name / store.CASE
    try:
        case = found.case(name, split)
    except checks.UserError as error:
        return [str(error)]
    facts, annotated = store.read_json(made), case.annotates(kept)
    if facts.get("annotated") != (None if annotated is None else list(annotated)):
        return ["which classes it annotates"]
    return origin.changes(
        facts,
        case.files,
        root=found.root,
        made=made.stat().st_mtime_ns,
        whole=whole,
    )


def _run(job, dataset, todo, root, progress, **pool):
    """Write the missing cases; return {case: reason} of failures."""
    waiting, rows = todo.waiting, todo.rows
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
        finished = run_each(job, cases, folder=root, **pool)
        for count, (case, future) in enumerate(finished, start=1):
            bar.set_postfix_str(rate(count, time.monotonic() - start), refresh=False)
            try:
                end(case.name, future.result())
            except WorkerDiedError as error:
                files.remove_partial(root, of=case.name)
                end(case.name, str(error))
    return {name: failed[name] for name in rows if name in failed}


def rate(cases: int, seconds: float) -> str:
    """Return cases per second in words; per minute if they are slow."""
    found = cases / max(seconds, 1e-3)
    return f"{found:.1f} cases/s" if found >= 1 else f"{60 * found:.1f} cases/minute"


def write(
    root: Path, case: Case, *, options: Options, classes: ClassMap, source: Path
) -> str | None:
    """Write one case with files of `classes`; return the reason if it is unusable.

    Any failure of a case is its reason, for example lack of memory.

    Raises:
        UserError: if the store cannot be written, since all other cases would fail too.
    """
    files.remove_partial(root, of=case.name)  # of a process that died
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what matters is checked
            sample = load_case(
                case, classes=classes, kept=options.classes, overlaps=options.overlaps
            )
        facts = {
            "name": case.name,
            "source_shape": sample.source_shape,
            "source_affine": sample.source_affine.tolist(),
            "overlapping_voxels": sample.overlapping,
            "notes": sample.notes,
            "absent": sample.absent,
            **origin.record(case.files, root=source),
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
            f"{' '.join(str(error).split())[:600]}; make room or fix its permissions, "
            "and give the same command again: finished cases stay."
        ) from error
    except Exception as error:
        return _reason(error)
    return None


def _reason(error):
    if isinstance(error, checks.UserError):
        return str(error)
    return f"{type(error).__name__}: {' '.join(str(error).split())[:600]}"


def _list_cases(root, todo):
    """Write the store's meta.csv; remove unlisted cases only on request."""
    for name in todo.gone if todo.prune else ():
        shutil.rmtree(root / name, ignore_errors=True)
    (root / meta.META).unlink(missing_ok=True)
    meta.add(root, todo.rows)
