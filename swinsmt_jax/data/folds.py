"""Cross-validation: the training and validation cases of each fold."""

from collections.abc import Mapping, Sequence

import numpy as np

from swinsmt_jax import checks

COUNT = 5  # folds where a dataset lists none
SEED = 12345

Fold = Mapping[str, Sequence[str]]


def splits_of(
    number: int, names: Sequence[str], *, folds: Sequence[Fold] = ()
) -> dict[str, str]:
    """Return {case: "train" or "val"} of a fold; other cases take no part.

    Args:
        number: of the fold, from 0 on.
        names: of all cases for training or validation.
        folds: the dataset's own list, {"train": names, "val": names} each. Without it,
            `SEED` draws `COUNT` folds from the sorted names.

    Raises:
        UserError: for an unknown fold, a fold whose cases are missing, and fewer cases
            than folds.
    """
    count = len(folds) or COUNT
    checks.require(
        0 <= number < count,
        f"the fold {number} is not one of the {count} folds 0 to {count - 1}.",
    )
    if not folds:
        checks.require(
            len(names) >= COUNT,
            f"{COUNT} folds need at least {COUNT} cases for training and validation, "
            f"but there are {len(names)}.",
        )
        drawn = np.random.default_rng(SEED).permutation(sorted(names))
        held_out = set(np.array_split(drawn, COUNT)[number].tolist())
        return {name: "val" if name in held_out else "train" for name in names}
    splits = {
        name: split for split in ("train", "val") for name in folds[number][split]
    }
    lost = [name for name in splits if name not in names]
    checks.require(
        not lost,
        f"the fold {number} lists {len(lost)} cases that are not there, such as "
        f"{', '.join(lost[:3])}; preprocess them, or fix splits_final.json.",
    )
    return {name: splits[name] for name in names if name in splits}


def divided(
    splits: Mapping[str, str], number: int, *, folds: Sequence[Fold] = ()
) -> dict[str, str]:
    """Return {case: split} with training and validation cases redivided by a fold.

    -1 leaves them as they are. Other arguments as in `splits_of`.
    """
    if number < 0:
        return dict(splits)
    names = [name for name, split in splits.items() if split != "test"]
    drawn = splits_of(number, names, folds=folds)
    return drawn | {n: split for n, split in splits.items() if split == "test"}
