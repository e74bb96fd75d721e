"""The list of metrics, and what of them is measured.

Unless a convention of another tool is followed, a class that the truth of a case lacks
has no score there, whatever was predicted; one that is present but not predicted has
Dice and surface Dice 0 and no distance. That is the rule of TotalSegmentator's
resources/evaluate.py. What is predicted though absent is counted apart.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from swinsmt_jax import checks
from swinsmt_jax.evaluation import surface
from swinsmt_jax.evaluation.conventions import OWN, convention
from swinsmt_jax.evaluation.overlap import Pair, missed_classes
from swinsmt_jax.evaluation.surface import SurfaceRule
from swinsmt_jax.results import statistics


@dataclass(frozen=True)
class Metric:
    """A score of each class of a case, which all tables and files then show.

    Attributes:
        name: its key in results.json and its column in CSV files.
        title: its name in tables.
        unit: such as "mm"; for "%", tables show the score times 100.
        format: of the number in tables, as ".2f".
        compute: from a `Pair` to scores `[K]`, NaN for a class without one; a function
            of a module, so that other processes can import it. Of surfaces, from
            `surface.Distances` of one class and a `SurfaceRule` to its score.
        surfaces: whether it compares surfaces, which users may leave out.
        definition: in a line, for the head of tables.
        confidence: whether it needs the network's probabilities.
        penalises: the metric whose scores it takes, if it has no `compute`; a class
            that was missed gets the diagonal of the scan in mm.
    """

    name: str
    title: str
    unit: str
    format: str
    compute: Callable | None = None
    surfaces: bool = False
    definition: str = ""
    penalises: str = ""
    confidence: bool = False

    @property
    def heading(self) -> str:
        """Title and unit; per cent is not shown."""
        return self.title if self.unit == "%" else f"{self.title} ({self.unit})"

    def text(self, score: float) -> str:
        """Format a score without its unit, "-" for NaN."""
        scale = 100 if self.unit == "%" else 1
        return "-" if np.isnan(score) else format(scale * score, self.format)


METRICS: dict[str, Metric] = {}  # in the order of rows and columns
SHORT = {  # names on the command line that stand for others
    "nsd": ("surface_dice",),
    "hd95": ("hd95", "hd95_penalised"),
    "assd": ("assd", "assd_penalised"),
    "volume": ("volume", "volume_ml"),
}


def register(metric: Metric) -> Metric:
    """Add a metric to all that is measured; a `UserError` for a name taken."""
    checks.require(
        metric.name not in METRICS,
        f"a metric named {metric.name!r} is registered already; choose another name.",
    )
    METRICS[metric.name] = metric
    return metric


def chosen_metrics(
    names: Sequence[str] | None = None,
    *,
    surface_rule: SurfaceRule | None,
    protocol: str | None = None,
    confidence: bool = False,
) -> tuple[Metric, ...]:
    """Return the metrics of these names, by default all that the protocol has.

    Those of surfaces are left out if there is no rule for them, and those of the
    network's `confidence` unless that is true.

    Raises:
        UserError: for a name unknown, or unknown to the protocol, and without Dice, by
            which cases are ranked.
    """
    own, wanted = convention(protocol), set()
    for name in names or ():
        checks.one_of("metrics", name, {**METRICS, **SHORT})
        full = SHORT.get(name, (name,))
        wanted |= {*full}
        checks.require(
            not protocol or full[0] in own.measures,
            f"metrics has {name!r}, which {own.title} does not have; of it, "
            f"--protocol={protocol} gives {', '.join(own.measures)}.",
        )
    unsure = [n for n in wanted if n in METRICS and METRICS[n].confidence]
    checks.require(
        confidence or not unsure,
        f"metrics has {checks.listed(sorted(unsure))}, which needs the network's "
        "probabilities; give --confidence instead.",
    )
    checks.require(
        names is None or "dice" in wanted,
        f"metrics is {list(names or ())}, but must have 'dice'.",
    )
    wanted |= {METRICS[name].penalises for name in wanted}
    found = []
    for name, metric in METRICS.items():
        if metric.confidence:
            found += [metric] if confidence else []
            continue
        if (names is not None and name not in wanted) or (
            metric.surfaces and surface_rule is None
        ):
            continue
        if name in own.measures:
            compute, definition = own.measures[name]
            metric = dataclasses.replace(metric, compute=compute, definition=definition)
        elif protocol:
            continue
        found.append(metric)
    return tuple(found)


def measured(
    pair: Pair, metrics: Sequence[Metric], *, surface_rule: SurfaceRule | None
) -> dict[str, np.ndarray]:
    """Return the scores `[K]` of each metric, as from `chosen_metrics`."""
    scores = {m.name: m.compute(pair) for m in metrics if m.compute and not m.surfaces}
    measures = {m.name: m.compute for m in metrics if m.compute and m.surfaces}
    if measures:
        scores |= surface.by_class(
            measures,
            pair.prediction,
            pair.truth,
            spacing=pair.spacing,
            num_classes=len(pair.counts.truth),
            rule=surface_rule or SurfaceRule(),
            workers=pair.workers,
        )
    missed = missed_classes(pair.counts)
    diagonal = np.linalg.norm(np.multiply(pair.truth.shape, pair.spacing))
    for metric in metrics:
        if metric.penalises:
            found = scores[metric.penalises]
            scores[metric.name] = np.where(missed, diagonal, found)
    return {metric.name: scores[metric.name] for metric in metrics}


def _register_own(name, title, unit, format, **options):
    compute, definition = OWN.measures[name]
    metric = Metric(
        name, title, unit, format, compute, definition=definition, **options
    )
    return register(metric)


def _register_distance(name, title):
    _register_own(name, title, "mm", ".2f", surfaces=True)
    register(
        Metric(
            f"{name}_penalised",
            f"{title}, missed = diagonal",
            "mm",
            ".2f",
            surfaces=True,
            definition=f"{title}, where a missed structure has the scan's diagonal",
            penalises=name,
        )
    )


DICE = _register_own("dice", "Dice", "%", ".2f")
_register_own("surface_dice", "surface Dice", "%", ".2f", surfaces=True)
_register_distance("hd95", "HD95")
_register_distance("assd", "ASSD")
_register_own("volume", "volume difference", "%", ".2f")
_register_own("volume_ml", "volume difference", "ml", ".2f")


def _register_confidence(row, title, definition):
    name = statistics.CONFIDENCE[row]
    compute = functools.partial(_confidence, row=row)
    metric = Metric(
        *(name, title, "%", ".1f", compute), definition=definition, confidence=True
    )
    register(metric)


def _confidence(pair, *, row):
    return pair.confidence[row]


_register_confidence(0, "probability", "mean probability of the predicted voxels")
_register_confidence(1, "5th percentile", "of the predicted voxels' probability")
_register_confidence(
    2, "second within 0.1", "share of voxels whose second class is within 0.1"
)
