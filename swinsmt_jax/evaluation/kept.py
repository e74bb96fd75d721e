"""Cases that are scored: kept by case until the evaluation has all of them.

What is kept is also what processes exchange: plain values, see `runtime.plain`.
"""

import dataclasses
import hashlib
from collections.abc import Callable, Collection, Iterable, Sequence
from pathlib import Path
from typing import TypeVar

from absl import logging
from tqdm import tqdm

from swinsmt_jax import checks
from swinsmt_jax.data.case import Case
from swinsmt_jax.data.store import StoredCase
from swinsmt_jax.evaluation.overlap import Counts
from swinsmt_jax.evaluation.pictures import CaseViews
from swinsmt_jax.evaluation.scoring import CaseResult
from swinsmt_jax.inference.pictures import View
from swinsmt_jax.runtime import files, plain, processes
from swinsmt_jax.runtime.cluster import run_each
from swinsmt_jax.runtime.workers import WorkerDiedError

C = TypeVar("C", Case, StoredCase)
FOLDER = "cases"  # in the output
FAILURES = (checks.UserError, OSError, MemoryError)


@dataclasses.dataclass(frozen=True)
class Kept:
    """What an evaluation has scored so far, in its output folder.

    Attributes:
        output: the folder.
        key: of all that decides scores, but the case; see `key_of`.
    """

    output: Path
    key: str

    def outcome(
        self,
        case: C,
        inputs: Iterable[Path],
        score: Callable[[C], tuple[CaseResult, CaseViews]],
    ) -> dict:
        """Return a case's scores, or why there are none, as plain values.

        Args:
            case: to be scored.
            inputs: its files; where one changes, the case is scored again.
            score: scores the case, unless an earlier run did.
        """
        try:
            file = self.output / FOLDER / f"{case.name}.json"
            key = key_of(self.key, [_stamp(path) for path in inputs])
            if found := _read(file, key):
                return found
            result, views = score(case)
            found = {"key": key, "result": dataclasses.asdict(result)}
            found["views"] = dataclasses.asdict(views)
            files.write_text(file, plain.dumps(found))
            return found
        except FAILURES as error:
            logging.error("%s: %s", case.name, error)
            return {"name": case.name, "error": checks.one_line(error, 1000)}

    def begin(self) -> None:
        """Make the folders, and remove partial files of a killed run."""
        files.require_no_link(self.output / FOLDER)
        for folder in (self.output, self.output / FOLDER):
            files.make_folder(folder)
            files.remove_partial(folder)

    def end(self) -> None:
        """Remove what was kept, as the results are written."""
        files.remove(self.output / FOLDER)


def outcomes(
    job: Callable,
    cases: Collection,
    *,
    title: str,
    workers: int,
    dask: str,
    folder: Path,
) -> list[dict]:
    """Return what a job that ends with `Kept.outcome` makes of each case, in order.

    The first process shows a bar with a title; the rest as in `workers.run_each`.
    """
    finished = run_each(job, [*cases], workers=workers, dask=dask, folder=folder)
    quiet, found = not processes.is_first(), {}
    for case, future in tqdm(
        finished, title, total=len(cases), unit="case", disable=quiet
    ):
        try:
            found[case.name] = future.result()
        except WorkerDiedError as error:
            found[case.name] = {"name": case.name, "error": str(error)}
    return [found[case.name] for case in cases]


def key_of(*parts: object) -> str:
    """Return a hash of plain values."""
    return hashlib.sha256(plain.dumps(parts).encode()).hexdigest()[:16]


def scores_of(
    outcomes: Sequence[dict],
) -> tuple[list[CaseResult], list[CaseViews]]:
    """Return the scores and views of all cases.

    Raises:
        SomeFailedError: if a case has none.
    """
    failed = {found["name"]: found["error"] for found in outcomes if "error" in found}
    if failed:
        raise processes.SomeFailedError(
            f"{len(failed)} of {len(outcomes)} cases cannot be scored, so the split "
            "has no results; the others are kept, and the same command "
            f"continues: {'; '.join(f'{n}: {why}' for n, why in failed.items())}"
        )
    return [result_of(found["result"]) for found in outcomes], [
        _views_of(found["views"]) for found in outcomes
    ]


def result_of(found: dict) -> CaseResult:
    """Return what `dataclasses.asdict` made plain."""
    return CaseResult(**found | {"counts": Counts(*found["counts"])})


def _views_of(found):
    views = (
        View(**view | {"extent": tuple(view["extent"])}) for view in found["views"]
    )
    return CaseViews(**found | {"views": tuple(views)})


def _stamp(path):
    facts = path.stat()
    return [str(path), facts.st_size, facts.st_mtime_ns]


def _read(file, key):
    try:
        found = plain.loads(file.read_bytes())
        return found if found["key"] == key else None
    except (FileNotFoundError, ValueError, TypeError, KeyError):
        return None  # of a version that kept something else
