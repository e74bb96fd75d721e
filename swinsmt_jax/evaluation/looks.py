"""Looks at predictions: warnings about anatomy, and pages of the worst cases."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from absl import logging

from swinsmt_jax.data.sample import Sample
from swinsmt_jax.data.volume import Volume
from swinsmt_jax.evaluation.kept import FOLDER
from swinsmt_jax.evaluation.pictures import CaseViews
from swinsmt_jax.evaluation.scoring import CaseResult, Segmented
from swinsmt_jax.results import anatomy, viewer
from swinsmt_jax.results.result import Result
from swinsmt_jax.runtime import files

WORST = 5  # cases of which pages are made


class Looks(NamedTuple):
    """What is requested besides scores.

    Attributes:
        confidence: how sure the network is, by class.
        quality: warnings about the anatomy of predictions.
        view: pages of the worst cases, truth beside prediction.
    """

    confidence: bool = False
    quality: bool = False
    view: bool = False

    def require(self) -> None:
        """Raise `UserError` without the extra that pages need."""
        if self.view:
            viewer.require()

    @property
    def decides(self) -> dict[str, bool]:
        """What of it decides what is kept of a case."""
        return {name: True for name, on in self._asdict().items() if on}

    def at(
        self,
        segmented: Segmented,
        names: Sequence[str],
        output: Path,
        usual_ml: Mapping[str, tuple[float, ...]],
    ) -> CaseResult:
        """Return a case's result with warnings; keep its prediction if pages follow."""
        case = segmented.result
        if self.view:
            with files.replacing(output / FOLDER / f"{case.name}.npz") as partial:
                with partial.open("wb") as file:
                    np.savez_compressed(file, segmented.prediction)
        if not self.quality:
            return case
        scan, prediction = segmented.scan, segmented.prediction
        result = _result(scan, prediction, names, usual_ml)
        found = anatomy.check(result)
        for warning in found:
            logging.warning("case %r: %s", case.name, warning.reason)
        return dataclasses.replace(case, warnings=[w._asdict() for w in found])

    def pages(
        self,
        output: Path,
        cases: Sequence[Any],
        views: Sequence[CaseViews],
        names: Sequence[str],
        *,
        read: Callable[[Any], Sample] = lambda case: case.read(),
    ) -> dict[str, str]:
        """Write pages of the worst cases by Dice; return {case: file name}.

        Args:
            output: the folder, which holds what `at` kept.
            cases: all of them; `read` gives scan and truth.
            views: of the cases, in the same order.
            names: of the label ids.
        """
        if not self.view:
            return {}
        dice = np.nan_to_num([view.dice for view in views], nan=2.0)
        found = {}
        for i in np.argsort(dice, kind="stable")[:WORST].tolist():
            scan = read(cases[i])
            with np.load(output / FOLDER / f"{scan.name}.npz") as kept:
                result = _result(scan, kept["arr_0"], names, {})
            name = f"view_{scan.name}.html"
            with files.replacing(output / name) as partial:
                viewer.write(partial, result, truth=scan.label)
            found[scan.name] = name
        return found


def _result(scan, prediction, names, usual_ml):
    grid = scan.affine, scan.affine, scan.image.shape
    volume = Volume(scan.image, *grid, Path(scan.name))
    return Result(
        volume, prediction.astype(np.uint8), dict(enumerate(names[1:], 1)), usual_ml
    )
