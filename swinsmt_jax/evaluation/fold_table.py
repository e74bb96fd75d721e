"""The results of a cross-validation: each fold's run on its own validation cases."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from swinsmt_jax import checks
from swinsmt_jax.evaluation.compare import read_results
from swinsmt_jax.runtime.files import absolute


def fold_table(folders: Sequence[str | Path], *, split: str = "val") -> str:
    """Format the Dice of each fold by group, in per cent, with mean and deviation.

    Args:
        folders: of runs, of which eval_<split> is taken, or of results.
        split: that each was evaluated on.

    Raises:
        UserError: for files that are not results, a case that two folds have, and other
            groups or averages.
    """
    found = [read_results(absolute(folder), split) for folder in folders]
    owner: dict[str, str | Path] = {}
    for folder, content in zip(folders, found, strict=True):
        for entry in ("groups", "average"):
            checks.require(
                content.get(entry) == found[0].get(entry),
                f"{folder} and {folders[0]} were evaluated with other {entry}; "
                "evaluate all folds in the same way.",
            )
        for case in content["cases"]:
            checks.require(
                case not in owner,
                f"the case {case!r} is in the results of {owner.get(case)} and of "
                f"{folder}, but each case belongs to one fold; train with "
                "--fold=0, --fold=1 and so on, and evaluate with --split=val.",
            )
            owner[case] = folder
    groups = [*found[0]["groups"], "overall"]
    dice = np.array([[c["dice"].get(g) for g in groups] for c in found], float) * 100
    width = max(len(str(folder)) for folder in (*folders, "mean +- deviation")) + 2
    rows = [f"{'Dice (%)':<{width}}{'cases':>6}" + "".join(f"{g:>15}" for g in groups)]
    for folder, content, row in zip(folders, found, dice, strict=True):
        cells = "".join(f"{value:15.2f}" for value in row)
        rows.append(f"{str(folder):<{width}}{len(content['cases']):6}{cells}")
    several = len(found) > 1
    spread = dice.std(axis=0, ddof=1) if several else np.full(len(groups), np.nan)
    pairs = zip(dice.mean(axis=0), spread, strict=True)
    cells = "".join(f"{f'{mean:.2f} +- {own:.2f}':>15}" for mean, own in pairs)
    rows.append(f"{'mean +- deviation':<{width}}{len(owner):6}{cells}")
    return "\n".join(rows)
