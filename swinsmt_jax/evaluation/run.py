"""Run a network over the cases of a split and count what it got right.

A class that the truth of a case lacks has no score there, whatever was predicted; one
that is present but not predicted scores 0. That is the rule of TotalSegmentator's
resources/evaluate.py, for Dice and surface Dice alike. What is predicted though absent
is counted apart. Labels are compared on the scan's own grid.
"""

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import jax
import numpy as np

from swinsmt_jax import checks
from swinsmt_jax.config import DataConfig, ExperimentConfig, InferenceConfig
from swinsmt_jax.data import nifti, pipeline, transforms
from swinsmt_jax.data.network_view import network_view
from swinsmt_jax.evaluation import metrics, surface
from swinsmt_jax.evaluation.metrics import Counts
from swinsmt_jax.inference.segment import segment
from swinsmt_jax.inference.sliding_window import Predict
from swinsmt_jax.runtime import processes

PICTURES = 3  # cases drawn in a validation


@dataclass(frozen=True)
class SurfaceRule:
    """How the surfaces of a prediction and the truth are compared.

    Attributes:
        tolerance: mm within which two surfaces count as one.
        spacing: sides of a voxel in mm, if not those of the scan.
    """

    tolerance: float = surface.TOLERANCE
    spacing: tuple[float, float, float] | None = None


@dataclass(frozen=True)
class CaseResult:
    """What was found in one case.

    Attributes:
        name: the case's id.
        counts: voxels of each class in prediction, truth and both.
        seconds: time of the prediction, without reading the case; NaN if unknown.
        surface: normalised surface Dice of each class, as `surface.surface_dice` gives
            it; None if it was not measured.
    """

    name: str
    counts: Counts
    seconds: float
    surface: np.ndarray | None = None


@dataclass(frozen=True)
class Segmented:
    """A case with its prediction; volumes are `[D, H, W]` in RAS orientation.

    Attributes:
        result: the counts.
        image: HU scaled to [0, 1], float32.
        truth: class ids, uint8.
        prediction: class ids, uint8.
        spacing: sides of a voxel in mm.
    """

    result: CaseResult
    image: np.ndarray
    truth: np.ndarray
    prediction: np.ndarray
    spacing: tuple[float, ...]


def segment_cases(
    predict: Predict,
    cases: Iterable,
    *,
    data: DataConfig,
    inference: InferenceConfig,
    num_classes: int,
    sharding: jax.sharding.Sharding | None = None,
    surface_rule: SurfaceRule | None = None,
) -> Iterator[Segmented]:
    """Yield every case with its prediction, compared on the scan's own grid.

    Args:
        predict: a jitted function `[b, *window, C] -> [b, *window, K]`.
        cases: as from `pipeline.find_cases`.
        data: of the experiment whose network `predict` is.
        inference, num_classes, sharding: as in `inference.segment`.
        surface_rule: how surfaces are compared; None leaves that out.

    Raises:
        UserError: for bad files, or labels that the network has no output for.
    """
    for case in cases:
        scan = case.read()
        top = int(scan.label.max())
        checks.require(
            top < num_classes,
            f"case {case.name!r} holds label {top}, but the network's model."
            f"out_channels is {num_classes}, so its labels end at {num_classes - 1}; "
            "evaluate on data with the classes of the training.",
        )
        view = network_view(
            scan.image, scan.affine, spacing=data.spacing, hu_range=data.hu_range
        )
        start = time.perf_counter()
        prediction = segment(
            predict,
            view,
            window=data.patch_shape,
            num_classes=num_classes,
            inference=inference,
            sharding=sharding,
        )
        seconds = time.perf_counter() - start
        spacing = nifti.spacing_of(scan.affine)
        result = score(
            case.name,
            prediction,
            scan.label,
            seconds=seconds,
            spacing=spacing,
            num_classes=num_classes,
            surface_rule=surface_rule,
        )
        image = transforms.scaled(scan.image, hu_range=data.hu_range)
        yield Segmented(result, image, scan.label, prediction, spacing)


def score(
    name: str,
    prediction: np.ndarray,
    truth: np.ndarray,
    *,
    seconds: float,
    spacing: Sequence[float],
    num_classes: int,
    surface_rule: SurfaceRule | None,
    workers: int | None = None,
) -> CaseResult:
    """Compare two label maps `[X, Y, Z]` of a case, with voxels of `spacing` mm.

    `workers` as in `surface.surface_dice`; the rest as in `CaseResult`.
    """
    counts = metrics.overlap_counts(prediction, truth, num_classes=num_classes)
    found = None
    if surface_rule is not None:
        found = surface.surface_dice(
            prediction,
            truth,
            spacing=surface_rule.spacing or spacing,
            num_classes=num_classes,
            tolerance=surface_rule.tolerance,
            workers=workers,
        )
    return CaseResult(name, counts, seconds, found)


def dice_scores(results: Sequence[CaseResult]) -> np.ndarray:
    """Dice of each case and class, `[cases, K]`; NaN where the truth has no voxel."""
    return np.stack([metrics.dice(result.counts) for result in results])


def surface_scores(results: Sequence[CaseResult]) -> np.ndarray | None:
    """Surface Dice as `dice_scores`; None if a case has none."""
    found = [result.surface for result in results]
    return None if any(x is None for x in found) else np.stack(found)


def false_positives(results: Sequence[CaseResult]) -> np.ndarray:
    """Classes predicted in a case whose truth lacks them, bool `[cases, K]`."""
    return np.stack([metrics.false_positive_classes(r.counts) for r in results])


def validate(
    predict: Predict,
    config: ExperimentConfig,
    cases: Sequence,
    *,
    groups: Mapping[str, Sequence[int]] | None = None,
    sharding: jax.sharding.Sharding | None = None,
    draw: Callable[[Segmented], np.ndarray] | None = None,
) -> dict:
    """Score the cases: what the training loop logs and picks the best step by.

    Several processes divide the cases between them, and each gets the whole result, but
    its own pictures: what `draw` makes of its first `PICTURES` cases.

    Returns:
        `dice`, the mean over the cases of each class and then over classes; `groups`,
        the same in each group; `false_positives`, the number of (case, class) pairs
        predicted though absent. NaN where no case has any of the classes. `pictures`,
        by name.
    """
    checks.require(len(cases) > 0, "validation needs at least one case, but has 0.")

    pictures = {}

    def segment():
        own, found = processes.share(cases), []
        segmented = segment_cases(
            predict,
            own,
            data=config.data,
            inference=config.inference,
            num_classes=config.model.out_channels,
            sharding=sharding,
        )
        for case in segmented:
            if draw is not None and len(pictures) < PICTURES:
                pictures[f"validation/{case.result.name}"] = draw(case)
            found.append(case.result)
        return found

    results = processes.unshare(processes.together(segment))
    if groups is None:
        groups = pipeline.class_map(config.data).groups
    groups = known_groups(groups, config.model.out_channels)
    means = metrics.group_averages(dice_scores(results), groups=groups)
    dice = {name: mean[metrics.AVERAGES[0]] for name, mean in means.items()}
    return {
        "dice": dice.pop("overall"),
        "groups": dice,
        "false_positives": int(false_positives(results).sum()),
        "pictures": pictures,
    }


def known_groups(
    groups: Mapping[str, Sequence[int]], num_classes: int
) -> dict[str, tuple[int, ...]]:
    """Keep the class ids that a network with fewer classes has, and their groups."""
    known = {n: tuple(i for i in ids if i < num_classes) for n, ids in groups.items()}
    return {name: ids for name, ids in known.items() if ids}
