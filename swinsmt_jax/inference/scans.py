"""Segment many scans: find them, write the outputs, skip failures."""

import contextlib
import dataclasses
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from absl import logging
from tqdm import tqdm

from swinsmt_jax import checks
from swinsmt_jax.class_map import ClassMap
from swinsmt_jax.data import dicom, nifti_file
from swinsmt_jax.data.dicom_files import MARK
from swinsmt_jax.data.label_files import load_prediction
from swinsmt_jax.inference import outputs, provenance, shared
from swinsmt_jax.inference.outputs import OutputOptions
from swinsmt_jax.inference.scan_reader import Scans
from swinsmt_jax.results import anatomy
from swinsmt_jax.results.result import Result
from swinsmt_jax.runtime import files
from swinsmt_jax.runtime.cluster import run_each
from swinsmt_jax.runtime.files import Claim
from swinsmt_jax.runtime.workers import Once, WorkerDiedError

ENDED = (
    "skipped this time, since the previous run was killed while it segmented this "
    "scan, usually because memory ran out. The same command tries it again; crop the "
    "scan, use --half, or give the process more memory."
)
TRUTH = "segmentations"  # stem of the labels beside a ct.nii.gz of TotalSegmentator's


def find_scans(
    inputs: Sequence[str | Path], *, series: str | None = None
) -> dict[str, Path]:
    """Return {name: file} of NIfTI files and of those in folders, sorted by folder.

    In folders, hidden files and TotalSegmentator's `segmentations.nii.gz` are left out.
    A folder with a DICOM series and no NIfTI file is itself a scan. A scan is named
    after its file without the suffix, or after its folder for `ct.nii.gz` and if
    several files share a name. With `series`, a UID or "all", the inputs are folders.
    These and their subfolders are searched for DICOM series, which are named after
    their UIDs.

    Raises:
        UserError: for an input that does not exist or is not a NIfTI file, a folder
            without one, and scans that would share a name.
    """
    if series:
        chosen = [
            pair
            for given in inputs
            for pair in dicom.chosen_series(files.absolute(given), series).items()
        ]
        names = [uid or scan.name.removesuffix(MARK) for uid, scan in chosen]
        return _named(names, [scan for _, scan in chosen])
    found = [file for given in inputs for file in _files(files.absolute(given))]
    stems = [nifti_file.stem(file) for file in found]
    names = [
        stem if stems.count(stem) == 1 and stem != "ct" else file.parent.name
        for file, stem in zip(found, stems, strict=True)
    ]
    return _named(names, found)


def _named(names, found):
    """Return {name: scan}; raise `UserError` if scans share a name."""
    for name in names:
        same = [str(f) for f, n in zip(found, names, strict=True) if n == name]
        checks.require(
            len(same) == 1,
            f"{len(same)} inputs would all be written as {name!r}: {', '.join(same)}; "
            "rename them, or segment them one after the other.",
        )
    return dict(zip(names, found, strict=True))


def _require_one_place_each(targets, output):
    """Raise `UserError` unless results are separate files in `output` itself."""
    places = Counter(path for files in targets.values() for path in files.values())
    places[output / shared.SUMMARY] += 1
    for name, kinds in targets.items():
        for path in kinds.values():
            checks.require(
                name.strip() != ""
                and name[0] != "."
                and name.isprintable()
                and path.parent == output
                and places[path] == 1,
                f"results of the scan {name!r} would be written to {path}, which is "
                "hidden, unprintable, outside of --output or the place of other "
                "results; rename the scan.",
            )


def segment_scans(
    segmenter: Scans,
    scans: Mapping[str, Path],
    output: Path,
    options: OutputOptions,
    *,
    load: Callable[[], Scans] | None = None,
    workers: int = 1,
    dask: str = "",
) -> dict[str, dict]:
    """Segment each scan and write its results to the folder `output`.

    Files appear when complete. Existing files stay unless `options.overwrite`: a
    complete scan is skipped, and missing statistics and pictures come from existing
    labels. A failure on one scan does not stop the others. Several processes with one
    output share the scans. A killed process passes its scan to the next one, which
    skips it once.

    Args:
        segmenter: the network.
        scans: {name: file}.
        output: the folder.
        options: what to write.
        load: returns `segmenter` in another process; it can be pickled.
        workers: processes that share the scans by `load`; one is this process itself.
        dask: address of a Dask scheduler, whose workers do it instead. With these or
            several `workers`, a scan whose process dies gets another turn.

    Returns:
        {name: {"file", "labels", "made_by", "seconds", "structures"}}, with {"error"}
        for failed scans, {"notes"} on doubtful points, and without "seconds" for scans
        that were not segmented. `summary.json` contains these and the entries of
        earlier calls.

    Raises:
        UserError: before anything is written, for classes that the network lacks, an
            output path that cannot be a writable folder, outputs that would replace
            inputs, and existing labels of other classes, of another scan, or from
            another network, step or options.
    """
    output = files.absolute(output)
    scans = {name: files.absolute(file) for name, file in scans.items()}
    known = segmenter.class_names
    for what in ("roi", "probabilities"):
        for name in getattr(options, what):
            checks.one_of(f"a class of {what}", name, known.values())
    names = {i: n for i, n in known.items() if not options.roi or n in options.roi}
    targets = {name: options.files(output, name, file) for name, file in scans.items()}
    _require_one_place_each(targets, output)
    options.require_possible(scans.values())
    outputs.require_free(targets, scans, known.values())
    made_by = {**segmenter.made_by, **options.made_by}
    if not options.overwrite:
        outputs.require_classes(targets, names.values())
        outputs.require_network(targets, options)
        record = shared.read(output)
        provenance.require_same(targets, scans, made_by, record)
    files.make_folder(output)
    checks.require(
        load is not None or not (dask or workers > 1),
        "other processes segment by what `load` returns; give it.",
    )
    make = load or (lambda: segmenter)
    run = getattr(segmenter, "run", "")
    work = _Work(Once(make, segmenter), run, output, options, names, made_by)
    items = {
        name: _Item(name, file, targets[name], _stamp(targets[name]["labels"]))
        for name, file in scans.items()
    }
    summary = {}
    if dask or workers > 1:
        summary = _elsewhere(work, items, workers=workers, dask=dask)
    else:
        with contextlib.closing(shared.turns(output, scans)) as turns:
            for number, (name, claim) in enumerate(turns, start=1):
                title = f"{name} ({number} of {len(scans)})"
                summary[name] = work.on(items[name], claim=claim, title=title)
    return {name: summary[name] for name in scans}


class _Item(NamedTuple):
    """A scan, its outputs, and its labels before."""

    name: str
    file: Path
    targets: Mapping[str, Path]
    before: tuple | None


def _elsewhere(work, items, **pool):
    """Have other processes do the work; return {name: entry}."""
    output, summary = work.output, {}
    found = run_each(work, [*items.values()], folder=output, **pool)
    for item, future in tqdm(found, "segmenting", total=len(items), unit="scan"):
        try:
            summary[item.name] = future.result()
        except WorkerDiedError as error:
            for path in item.targets.values():
                files.remove_partial(output, of=path.name)
            (output / f"{shared.LOCK}-{item.name}").unlink(missing_ok=True)
            labels = str(item.targets["labels"])
            entry = {"file": str(item.file), "labels": labels, "error": str(error)}
            shared.tell(output, item.name, entry)
            summary[item.name] = entry
    shared.finish_summary(output, {name: summary[name] for name in items})
    return summary


@dataclasses.dataclass(frozen=True)
class _Work:
    """The work on a scan that no other process holds."""

    segmenter: Once[Scans]
    run: str
    output: Path
    options: OutputOptions
    names: Mapping[int, str]
    made_by: Mapping[str, object]

    def __call__(self, item):
        """Work in a worker, which may find the remains of a dead one."""
        lock = self.output / f"{shared.LOCK}-{item.name}"
        with files.claimed(lock, wait=True):
            return self.on(item, claim=Claim.FREE)

    def on(self, item, *, claim, title=""):
        """Write a scan's missing outputs, or all again; return its entry."""
        name, file, targets, stamp = item
        again = self.options.overwrite and stamp == _stamp(targets["labels"])
        for path in targets.values():
            files.remove_partial(self.output, of=path.name)
        before, labels = shared.read(self.output).get(name, {}), targets["labels"]
        there, missing = outputs.is_whole(labels), targets
        if there and not again:
            missing = {k: p for k, p in targets.items() if not outputs.is_whole(p)}
        kept, made_by = "labels" not in missing, before.get(provenance.KEY, {})
        found = {"file": str(file), "labels": str(labels), provenance.KEY: made_by}
        if not kept:
            found["run"] = self.run

        def clear():  # nobody may take new labels for the old ones, or mix the two
            nonlocal made_by
            made_by = {k: v for k, v in made_by.items() if k != labels.name}
            if there:
                shared.tell(self.output, name, before | {provenance.KEY: made_by})
            self.options.remove_results(self.output, name)

        try:
            if kept:  # perhaps by another process, of something else
                about = {name: targets}, {name: file}, self.made_by, {name: before}
                provenance.require_same(*about)
            else:
                checks.require(claim is not Claim.LEFT, ENDED)
                now = {"scan": provenance.digest_of_scan(file), **self.made_by}
                found[provenance.KEY] = made_by | {labels.name: now}
                if not there:  # for a killed process leaves labels all the same
                    shared.tell(self.output, name, before | found)
            if missing:
                source = labels if kept else clear
                about = missing, self.names, self.options, title
                found |= _segment(self.segmenter(), file, source, *about)
        except Exception as error:  # also memory, a bug: other scans may do without it
            found["error"] = _reason(name, error)
            if there:
                found[provenance.KEY] = made_by
        before = before if "seconds" not in found else {}
        entry = {k: v for k, v in before.items() if k != "error"} | found
        shared.tell(self.output, name, entry)
        return found


def _reason(name, error):
    """Log why a scan failed, and return it."""
    if isinstance(error, checks.UserError):
        logging.error("%s: %s", name, error)
        return str(error)
    logging.exception("%s failed", name)
    return f"{type(error).__name__}: {error}"


def _stamp(path):
    """Return a stamp that changes with a file or folder; None if it is absent."""
    try:
        facts = path.stat()
    except OSError:
        return None
    return facts.st_ino, facts.st_mtime_ns


def _segment(segmenter, file, source, missing, names, options, title):
    """Write a scan's missing outputs.

    `source` is its label file, or a function to call before new labels are written.
    """
    volume = segmenter.read(file)
    facts: dict[str, object] = {"notes": [*volume.notes]} if volume.notes else {}
    known: dict = {}
    if callable(source):
        start = time.perf_counter()
        with _bar(title) as progress:
            labels, known = _decided(segmenter, volume, options, progress)
        facts["seconds"] = round(time.perf_counter() - start, 2)
        wanted = np.zeros(256, np.uint8)
        wanted[list(names)] = list(names)
        labels = wanted[labels]
        if options.clean:
            labels, removed = anatomy.clean(Result(volume, labels, names))
            for structure, voxels in removed.items():
                logging.info("%s: %d voxels of %s removed", file, voxels, structure)
            facts["voxels_removed"] = removed
    else:
        classes = ClassMap(("background", *segmenter.class_names.values()))
        labels = load_prediction(source, classes=classes, like=volume)
    result = Result(volume, labels, names, segmenter.usual_ml, **known)
    if callable(source):
        source()
    outputs.write(missing, result, options)
    if "quality" in missing:
        facts["warnings"] = [found.reason for found in anatomy.check(result)]
        for reason in facts["warnings"]:
            logging.warning("%s: %s", file, reason)
    found = np.unique(labels).tolist()
    return facts | {"structures": [names[i] for i in found if i in names]}


def _decided(segmenter, volume, options, progress):
    """Return labels, and the requested facts of their probabilities."""
    if not (options.confidence or options.probabilities):
        return segmenter.segment_volume(volume, progress=progress), {}
    ids = {name: i for i, name in segmenter.class_names.items()}
    found = segmenter.decide_volume(
        volume,
        confidence=options.confidence,
        chosen=[ids[name] for name in options.probabilities],
        progress=progress,
    )
    chosen = {
        name: found.chosen[..., k] for k, name in enumerate(options.probabilities)
    }
    known = {"probability": found.probability, "close": found.close, "chosen": chosen}
    return found.labels, known


@contextlib.contextmanager
def _bar(title) -> Iterator:
    quiet = not title
    with tqdm(desc=title, unit="window", dynamic_ncols=True, disable=quiet) as bar:

        def progress(done, number):
            bar.total = number
            bar.update(done - bar.n)

        yield progress


def _files(path: Path) -> list[Path]:
    checks.require(path.exists(), f"the input {path} does not exist.")
    if path.is_file():
        checks.require(
            nifti_file.is_named(path),
            f"the input {path} is not a scan: its name must end with "
            f"{', '.join(nifti_file.ENDINGS)}.",
        )
        return [path]
    found = [f for f in nifti_file.files_in(path) if nifti_file.stem(f) != TRUTH]
    if not found and dicom.is_series(path):
        return [path]
    checks.require(
        bool(found),
        f"the folder {path} holds no {', '.join(nifti_file.ENDINGS)} or DICOM files; "
        "only --series=all searches the folders in it, for DICOM series.",
    )
    return found
