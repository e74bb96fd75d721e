"""Means of scores over classes and cases, and their bootstrap intervals. numpy only."""

from collections.abc import Mapping, Sequence

import numpy as np

from swinsmt_jax import checks

AVERAGES = {
    "over_classes": "mean over cases of each class, then over classes",
    "over_cases": "mean over classes present in each case, then over cases",
    "over_pairs": "mean over all (case, class) pairs",
    "over_all_classes": "as over_classes, but none if a class is in no case (nnU-Net)",
}


def averages(
    scores: np.ndarray, *, classes: Sequence[int] | None = None
) -> dict[str, float]:
    """Mean of `scores [cases, K]` by each rule of `AVERAGES`; NaN entries are left out.

    The Swin SMT paper does not say how it averages: its overall Dice, 85.09, is neither
    the plain mean of its five groups (83.91) nor their mean weighted by the number of
    classes (84.23). So tables show all three, labelled; "over_classes" is the default.

    Args:
        scores: of a metric, by case and class id; column 0 is the background.
        classes: ids to average; by default all but the background.
    """
    scores = np.asarray(scores, np.float64)
    checks.require(
        scores.ndim == 2,
        f"scores have shape {scores.shape}, but must be [cases, classes].",
    )
    ids = list(range(1, scores.shape[1]) if classes is None else classes)
    for number in ids:
        checks.in_range("a class id to average", number, 0, scores.shape[1] - 1)
    once = np.ones((1, len(scores)))
    return {r: float(_weighted(scores[:, ids], once, r)[0]) for r in AVERAGES}


def group_averages(
    scores: np.ndarray, *, groups: Mapping[str, Sequence[int]]
) -> dict[str, dict[str, float]]:
    """Averages of `scores [cases, K]` in each group of class ids, then "overall".

    "overall" takes every class but the background, whether in a group or not.
    """
    by_group = {n: averages(scores, classes=ids) for n, ids in groups.items()}
    return {**by_group, "overall": averages(scores)}


def bootstrap_intervals(
    scores: np.ndarray,
    *,
    groups: Mapping[str, Sequence[int]],
    rule: str,
    samples: int = 2000,
) -> dict[str, tuple[float, float]]:
    """95 % percentile intervals of `group_averages` over redrawn cases.

    Written out, since `scipy.stats.bootstrap` gives NaN if one redrawn set of cases has
    no value, and copies the scores for every set instead of weighting the cases.

    Args:
        scores: `[cases, K]` as in `averages`.
        groups: class ids by group; "overall" is added.
        rule: one of `AVERAGES`.
        samples: how often the cases are redrawn, always with the same seed.

    Returns:
        low and high by group; NaN for fewer than two cases, or no value.
    """
    checks.one_of("rule", rule, AVERAGES)
    scores = np.asarray(scores, np.float64)
    cases, num_classes = scores.shape
    weights = np.random.default_rng(0).multinomial(
        cases, np.full(cases, 1 / cases), size=samples
    )
    found = {}
    for name, ids in {**groups, "overall": range(1, num_classes)}.items():
        drawn = _weighted(scores[:, list(ids)], weights, rule)
        drawn = drawn[~np.isnan(drawn)]
        known = cases > 1 and drawn.size > 0
        low, high = np.quantile(drawn, (0.025, 0.975)) if known else (np.nan,) * 2
        found[name] = float(low), float(high)
    return found


def known_groups(
    groups: Mapping[str, Sequence[int]], num_classes: int
) -> dict[str, tuple[int, ...]]:
    """Keep the class ids that a network with fewer classes has, and their groups."""
    known = {n: tuple(i for i in ids if i < num_classes) for n, ids in groups.items()}
    return {name: ids for name, ids in known.items() if ids}


def known_mean(values: np.ndarray, axis: int) -> np.ndarray:
    """Mean of the values that are not NaN; NaN, without a warning, if there is none."""
    present = ~np.isnan(values)
    count = present.sum(axis=axis)
    total = np.where(present, values, 0.0).sum(axis=axis)
    return np.where(count > 0, total / np.maximum(count, 1), np.nan)


def _weighted(values: np.ndarray, weights: np.ndarray, rule: str) -> np.ndarray:
    """Means `[samples]` of `[cases, n]` by the cases' weights `[samples, cases]`."""
    if rule == "over_cases":
        values = known_mean(values, axis=1)[:, None]
    present = ~np.isnan(values)
    count, total = weights @ present, weights @ np.where(present, values, 0.0)
    if rule == "over_pairs":
        count, total = (x.sum(axis=1, keepdims=True) for x in (count, total))
    means = np.where(count > 0, total / np.maximum(count, 1), np.nan)
    return means.mean(axis=1) if rule == "over_all_classes" else known_mean(means, 1)
