"""Segment the cases of a split and score what comes out, on the scans' own grids."""

import dataclasses
import time
from collections.abc import Callable, Sequence

import jax
import numpy as np

from swinsmt_jax import checks
from swinsmt_jax.config import DataConfig, InferenceConfig
from swinsmt_jax.data import pipeline
from swinsmt_jax.data.network_view import NetworkView, network_view
from swinsmt_jax.data.sample import Sample
from swinsmt_jax.evaluation import kept
from swinsmt_jax.evaluation.averages import known_groups
from swinsmt_jax.evaluation.metrics import DICE, Metric
from swinsmt_jax.evaluation.scoring import Evaluation, Segmented, score
from swinsmt_jax.evaluation.surface import SurfaceRule
from swinsmt_jax.inference.grid import LARGEST, Decision
from swinsmt_jax.inference.segmenter import segment
from swinsmt_jax.inference.sliding_window import Predict
from swinsmt_jax.runtime import processes

PICTURES = 3  # cases drawn in a validation


def segment_case(
    predict: Predict,
    case: pipeline.Case,
    *,
    data: DataConfig,
    inference: InferenceConfig,
    num_classes: int,
    sharding: jax.sharding.Sharding | None = None,
    metrics: Sequence[Metric] = (DICE,),
    surface_rule: SurfaceRule | None = None,
    view: Callable[[Sample], NetworkView] | None = None,
    decision: Decision = LARGEST,
    channels: int | None = None,
) -> Segmented:
    """Return a case with its prediction, compared on the scan's own grid.

    Args:
        predict: a jitted function `[b, *window, C] -> [b, *window, K]`.
        case: as from `pipeline.find_cases`.
        data: of the experiment whose network `predict` is.
        inference, num_classes, sharding: as in `inference.segmenter.segment`.
        metrics, surface_rule: what is measured, as in `scoring.score`.
        view: what the network is shown of a case, if not what `data` says.
        decision: how its logits become labels.
        channels: of the logits, if not one for each class.

    Raises:
        UserError: for bad files, or labels that the network has no output for.
    """
    scan = case.read()
    top = int(scan.label.max())
    checks.require(
        top < num_classes,
        f"case {case.name!r} holds label {top}, but the network's model."
        f"out_channels is {num_classes}, so its labels end at {num_classes - 1}; "
        "evaluate on data with the classes of the training.",
    )
    if view is None:
        shown = network_view(
            scan.image,
            scan.affine,
            spacing=data.spacing,
            hu_range=data.hu_range,
            normalization=data.normalization,
        )
    else:
        shown = view(scan)
    start = time.perf_counter()
    with checks.named(f"case {case.name!r}"):
        prediction = segment(
            predict,
            shown,
            window=data.patch_shape,
            num_classes=channels or num_classes,
            inference=inference,
            sharding=sharding,
            decision=decision,
        )
    return score(
        scan,
        prediction,
        seconds=time.perf_counter() - start,
        num_classes=num_classes,
        metrics=metrics,
        surface_rule=surface_rule,
    )


def validate(
    predict: Predict,
    cases: Sequence,
    *,
    data: DataConfig,
    inference: InferenceConfig,
    num_classes: int,
    sharding: jax.sharding.Sharding | None = None,
    draw: Callable[[Segmented, Sequence[str]], np.ndarray] | None = None,
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

    pictures: dict = {}

    def segment():
        found = []
        for case in processes.shard(cases):
            segmented = segment_case(
                predict,
                case,
                data=data,
                inference=inference,
                num_classes=num_classes,
                sharding=sharding,
            )
            if draw is not None and len(pictures) < PICTURES:
                pictures[f"validation/{case.name}"] = draw(segmented, data.class_names)
            found.append(dataclasses.asdict(segmented.result))
        return found

    found = processes.unshard(processes.run_on_all(segment))
    results = [kept.result_of(result) for result in found]
    groups = known_groups(pipeline.class_map(data).groups, num_classes)
    evaluation = Evaluation(results, groups)
    dice = evaluation.means(DICE)
    return {
        "dice": dice.pop("overall"),
        "groups": dice,
        "false_positives": int(evaluation.false_positives().sum()),
        "pictures": pictures,
    }
