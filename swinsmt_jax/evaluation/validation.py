"""Segment the cases of a split and score what comes out, on the scans' own grids."""

import dataclasses
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import numpy as np
from absl import logging

from swinsmt_jax import checks
from swinsmt_jax.class_map import ClassMap
from swinsmt_jax.config import DataConfig, InferenceConfig
from swinsmt_jax.data import pipeline
from swinsmt_jax.data.network_view import NetworkView, network_view, unlike_training
from swinsmt_jax.data.sample import Sample
from swinsmt_jax.evaluation import kept
from swinsmt_jax.evaluation.averages import known_groups
from swinsmt_jax.evaluation.metrics import DICE, Metric
from swinsmt_jax.evaluation.scoring import Evaluation, Segmented, score
from swinsmt_jax.evaluation.surface import SurfaceRule
from swinsmt_jax.inference.grid import LARGEST, Decision
from swinsmt_jax.inference.segmenter import decide
from swinsmt_jax.inference.sliding_window import Predict
from swinsmt_jax.runtime import processes

PICTURES = 3  # cases drawn in a validation


class Known(NamedTuple):
    """Classes of a network as those of data.

    Attributes:
        names: of the data's label ids.
        table: uint8 [256] from the network's ids to them; None if they are the same.
    """

    names: tuple[str, ...]
    table: np.ndarray | None

    @property
    def num_classes(self) -> int:
        """Number of the data's label ids, background included."""
        return len(self.names)


def known_classes(data: DataConfig, classes: ClassMap) -> Known | None:
    """Match a network's classes with those of data, by name.

    None for a network of TotalSegmentator's classes, or of the first of them, and data
    of these. Classes that the data have not count as background, with a warning.

    Args:
        data: of the network's experiment.
        classes: of the data.

    Raises:
        UserError: for a class of the data that the network lacks.
    """
    names = data.class_names
    if not data.classes and classes.names == names:
        return None
    table = classes.ids_of(names, what="the network")
    unknown = [
        name for i, name in enumerate(names) if table is not None and i and not table[i]
    ]
    if unknown:
        logging.warning(
            "%d classes of the network are unknown to the data and count as "
            "background: %s",
            len(unknown),
            checks.few(unknown),
        )
    return Known(classes.names, table)


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
    to_data: Known | None = None,
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
        to_data: how the network's classes become those of the case; None if they are
            the same.

    Raises:
        UserError: for bad files, or labels that the network has no output for.
    """
    scan = case.read()
    top, scored = scan.top, num_classes
    if to_data is not None:
        scored = to_data.num_classes
    checks.require(
        top < scored,
        f"case {case.name!r} holds label {top}, but the network's model."
        f"out_channels is {num_classes}, so its labels end at {num_classes - 1}; "
        "evaluate on data with the classes of the training.",
    )
    far = unlike_training(data.spacing, data.seen, scan.affine)
    if far:
        logging.warning("case %r: %s", case.name, far)
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
        decided = decide(
            predict,
            shown,
            window=data.patch_shape,
            num_classes=channels or num_classes,
            inference=inference,
            sharding=sharding,
            decision=decision._replace(confidence=any(m.confidence for m in metrics)),
        )
    prediction = decided.labels
    if to_data is not None and to_data.table is not None:
        prediction = to_data.table[prediction]
    return score(
        scan,
        prediction,
        seconds=time.perf_counter() - start,
        num_classes=scored,
        metrics=metrics,
        surface_rule=surface_rule,
        confidence=(decided.probability, decided.close),
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

    Several processes divide the cases between them, and each gets the whole result.

    Returns:
        `dice`, the mean over the cases of each class and then over classes; `groups`,
        the same in each group; `false_positives`, the number of (case, class) pairs
        predicted though absent. NaN where no case has any of the classes. `pictures`,
        what `draw` makes of the first `PICTURES` cases, by name.
    """
    checks.require(len(cases) > 0, "validation needs at least one case, but has 0.")

    shown = [case.name for case in cases[:PICTURES]] if draw else []

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
            own = {"result": dataclasses.asdict(segmented.result)}
            if draw is not None and case.name in shown:
                own["picture"] = draw(segmented, data.class_names)
            found.append(own)
        return found

    found = processes.unshard(processes.run_on_all(segment))
    results = [kept.result_of(own["result"]) for own in found]
    groups = known_groups(pipeline.groups_of(data), num_classes)
    evaluation = Evaluation(results, groups)
    dice = evaluation.means(DICE)
    return {
        "dice": dice.pop("overall"),
        "groups": dice,
        "false_positives": int(evaluation.false_positives().sum()),
        "pictures": {
            f"validation/{name}": own["picture"]
            for name, own in zip(shown, found, strict=False)
        },
    }
