"""Two evaluations of the same cases, compared as in the paper: paired, over cases.

For each group the mean Dice of every case (over the classes it has) is paired. The
p-value is that of Wilcoxon's signed-rank test (two-sided), corrected over the groups by
Holm's method; the effect size is the matched-pairs rank-biserial correlation (Kerby
2014): the share of the ranks in favour of one less the share in favour of the other.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from scipy import stats

from swinsmt_jax import checks
from swinsmt_jax.evaluation.averages import known_mean
from swinsmt_jax.runtime.files import absolute, read_json

FILE = "results.json"
SAMPLES = 10_000  # of the bootstrap
CONVENTIONS = {  # entry of results.json: (what it says, flags that set it)
    "convention": ("convention", "--protocol"),
    "cut_faces": ("cut faces", "--cut_faces"),
    "surface_tolerance_mm": ("tolerance of surfaces in mm", "--surface_tolerance"),
    "surface_spacing": ("voxels of surfaces in mm", "--protocol"),
}
LEAST = 6  # cases; with fewer no difference can reach p < 0.05


@dataclass(frozen=True)
class Difference:
    """Of one group, the second evaluation less the first, in Dice from 0 to 1.

    Attributes:
        group: its name, or "overall".
        first, second: means over the cases that have a class of the group.
        interval: 95 % bootstrap interval over cases of the mean difference.
        p: Wilcoxon's p-value; NaN for fewer than `LEAST` cases.
        holm: the same corrected for the number of groups.
        effect: rank-biserial correlation in [-1, 1].
        cases: number of pairs.
    """

    group: str
    first: float
    second: float
    interval: tuple[float, float]
    p: float
    holm: float
    effect: float
    cases: int


def compare(
    first: str | Path, second: str | Path, *, split: str = "test"
) -> list[Difference]:
    """Compare two evaluations: results.json, its folder, or that of a run.

    Of a run, eval_<split> is taken.

    Raises:
        UserError: for files that are not results, and evaluations of other splits,
            conventions, cases, grids, truths, groups, or classes of any case.
    """
    pair = one, other = [
        read_results(absolute(path), split) for path in (first, second)
    ]
    checks.require(
        one.get("split") == other.get("split"),
        f"{first} evaluated the split {one.get('split')!r} and {second} "
        f"{other.get('split')!r}; compare evaluations of the same split.",
    )
    _require_one_convention(first, one, second, other)
    shared = one["cases"].keys() & other["cases"].keys()
    checks.require(
        len(one["cases"]) == len(shared) == len(other["cases"]),
        f"{first} and {second} evaluated different cases, so they cannot be paired; "
        f"they share {len(shared)} of {len(one['cases'])} and {len(other['cases'])}. "
        "Evaluate the same split.",
    )
    _require_one_truth(first, one, second, other)
    checks.require(
        one["groups"] == other["groups"],
        f"{first} and {second} were evaluated with other groups of classes; evaluate "
        "again with the same --groups.",
    )
    cases = [*one["cases"].values(), *other["cases"].values()]
    classes = sorted(set().union(*(case["dice"] for case in cases)))
    scores = np.stack([_scores(content, one["cases"], classes) for content in pair])
    differs = np.isnan(scores[0]) ^ np.isnan(scores[1])
    for name, own in zip(one["cases"], differs, strict=True):
        alone = [classes[i] for i in np.flatnonzero(own)]
        checks.require(
            not alone,
            f"only one of {first} and {second} scored {len(alone)} classes of the case "
            f"{name!r}: {', '.join(alone[:5])}{', ...' if len(alone) > 5 else ''}. "
            "Their truths or classes differ; evaluate both on the same data.",
        )
    found = []
    for group, members in {**one["groups"], "overall": classes}.items():
        chosen = scores[..., [classes.index(c) for c in members if c in classes]]
        found.append(_difference(group, known_mean(chosen, axis=2)))
    corrected = holm([difference.p for difference in found])
    return [replace(d, holm=float(p)) for d, p in zip(found, corrected, strict=True)]


def _require_one_truth(first, one, second, other):
    """Refuse cases that were scored on other grids or against other truths."""
    for entry, what in (("grid", "grids"), ("truth", "truths")):
        differing = [
            name
            for name, own in one["cases"].items()
            if (there := other["cases"][name].get(entry)) and own.get(entry)
            if own[entry] != there
        ]
        checks.require(
            not differing,
            f"{first} and {second} scored {len(differing)} cases on other {what}, such "
            f"as {checks.few(differing)}, so their scores do not compare; evaluate "
            "both on the same data, the dataset itself or one store of it.",
        )


def _require_one_convention(first, one, second, other):
    """Refuse two evaluations that measured the same thing in different ways.

    One without surfaces fits any other, and so does one that does not say.
    """
    for entry, (what, flag) in CONVENTIONS.items():
        own, others = (
            (str(content[entry] or "the scan's own") if entry in content else None)
            for content in (one, other)
        )
        checks.require(
            None in (own, others) or own == others,
            f"{first} and {second} follow different conventions: the {what} is {own} "
            f"and {others}; evaluate both again with the same {flag}.",
        )


def table(differences: Sequence[Difference], *, first: str, second: str) -> str:
    """Format the comparison in per cent; an asterisk marks Holm's p below 0.05."""
    lines = [
        f"A: {first}",
        f"B: {second}",
        f"{'Dice (%)':<12}{'A':>8}{'B':>8}{'B - A':>8}{'95 % interval':>18}"
        f"{'p':>9}{'Holm':>9}{'effect':>8}{'cases':>7}",
    ]
    for d in differences:
        low, high = d.interval
        interval = f"[{100 * low:+.2f}, {100 * high:+.2f}]"
        star = "*" if d.holm < 0.05 else " "
        lines.append(
            f"{d.group:<12}{100 * d.first:8.2f}{100 * d.second:8.2f}"
            f"{100 * (d.second - d.first):+8.2f}{interval:>18}"
            f"{d.p:9.2g}{d.holm:9.2g}{star}{d.effect:+7.2f}{d.cases:7}"
        )
    lines.append(
        "Wilcoxon's signed-rank test over cases, Holm's correction over the rows; "
        "effect: rank-biserial correlation."
    )
    if any(np.isnan(d.p) for d in differences):
        lines.append(f"nan: fewer than {LEAST} cases cannot reach p < 0.05.")
    return "\n".join(lines)


def _difference(group, pairs):
    pairs = pairs[:, ~np.isnan(pairs).any(axis=0)]
    means = pairs.mean(axis=1).tolist() if pairs.size else [float("nan")] * 2
    change = pairs[1] - pairs[0]
    ranks = stats.rankdata(np.abs(change))
    effect = (ranks * np.sign(change)).sum() / max(ranks[change != 0].sum(), 1)
    p, interval = wilcoxon(change), _interval(change)
    return Difference(group, *means, interval, p, p, float(effect), len(change))


def _interval(change):
    if len(change) < 2:  # too few for scipy
        return (float(change.sum()) if len(change) else float("nan"),) * 2
    found = stats.bootstrap(
        (change,),
        np.mean,
        method="percentile",
        n_resamples=SAMPLES,
        rng=np.random.default_rng(0),
    )
    low, high = found.confidence_interval
    return float(low), float(high)


def wilcoxon(change: np.ndarray) -> float:
    """Return the two-sided p-value of differences [cases]; NaN for under `LEAST`."""
    if len(change) < LEAST:
        return float("nan")
    if not change.any():
        return 1.0
    return float(stats.wilcoxon(change, zero_method="pratt").pvalue)


def holm(p_values: Sequence[float]) -> np.ndarray:
    """Correct p-values; those that are NaN stay so and do not count.

    scipy has no correction of Holm's; for statsmodels' alone, pandas would be needed.
    """
    p = np.array(p_values)
    order = np.argsort(p)[: np.count_nonzero(~np.isnan(p))]  # NaN come last
    raised = p[order] * np.arange(len(order), 0, -1)
    p[order] = np.minimum(1.0, np.maximum.accumulate(raised))
    return p


def _scores(content, cases, classes):
    """Return Dice `[cases, classes]`; NaN for none."""
    dice = [content["cases"][name]["dice"] for name in cases]
    return np.array([[own.get(c) for c in classes] for own in dice], np.float64)


def read_results(path: Path, split: str) -> dict:
    """Return results.json of a file, its folder, or that of a run.

    Raises:
        UserError: for files that are not results of an evaluation.
    """
    places = path / FILE, path / f"eval_{split}" / FILE, path
    file = next((file for file in places if file.is_file()), path)
    try:
        content = read_json(file)
        content["cases"], content["groups"]  # noqa: B018 - KeyError if absent
        return content
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise checks.UserError(
            f"{file} holds no results of an evaluation ({error!r}); give the folder "
            "that evaluate.py wrote, such as runs/x/eval_test, or runs/x and --split."
        ) from error
