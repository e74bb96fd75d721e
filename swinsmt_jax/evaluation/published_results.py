"""What the authors of Swin SMT report on TotalSegmentator-V2, for twelve networks.

From the README of MI2DataLab/SwinSMT at commit 0e058b2: millions of parameters, seconds
("Time"), Dice in per cent. The classes of each group and the way of averaging are not
published. nnFormer's muscles and vessels are the same figure there, probably a slip.
"""

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

from swinsmt_jax import checks
from swinsmt_jax.data import meta
from swinsmt_jax.runtime import files

SOURCE = "the authors' repository (README of MI2DataLab/SwinSMT)"
GROUPS = ("organs", "vertebrae", "muscles", "ribs", "vessels", "overall")

_FIGURES = """
    UNETR           102.02   35  73.84  60.70  82.35  69.27  61.49  70.88
    SwinUNETR-S      18.34   15  78.21  63.43  85.02  69.98  62.23  73.90
    nnFormer        149.30   99  79.26  73.87  74.97  74.03  74.97  75.48
    DiNTS           147.00  150  80.05  71.42  85.32  73.71  70.13  77.64
    UNesT            87.30   45  80.75  71.93  86.43  72.79  69.61  77.70
    3D UX-Net        53.00   74  83.03  79.54  86.99  82.54  75.01  82.53
    SwinUNETR-B      72.76   37  83.46  79.76  87.57  82.61  75.23  82.81
    nnU-Net         370.74  300  82.02  82.89  86.98  85.27  75.51  83.44
    SwinUNETR-L     290.40  145  83.26  82.02  87.99  83.82  75.60  83.59
    3D RepUX-Net     65.80   80  80.85  84.00  87.63  84.22  75.91  83.81
    Universal Model  62.25   39  82.25  84.46  87.58  86.49  76.11  84.02
    Swin SMT        170.78   60  83.70  83.03  88.70  86.60  77.54  85.09
"""

# The public split of TotalSegmentator-V2 (record 10047292), whose ids end with s1429.
CASES = {"train": 1082, "val": 57, "test": 89}
LAST_ID = 1429


def are_of(root: str | Path, names: Sequence[str]) -> bool:
    """Whether these cases are the test split of TotalSegmentator-V2 itself.

    So the reported figures are of them. Told by meta.csv of the dataset, or of a store
    that was made of it: the sizes of the splits, and ids with gaps, which the phantoms
    do not have.
    """
    try:
        splits = meta.read(files.absolute(root))
    except checks.UserError:
        return False
    found = [re.fullmatch(r"s(\d{4})", name) for name in splits]
    ids = [int(match[1]) for match in found if match]
    own = [name for name, split in splits.items() if split == "test"]
    return (
        Counter(splits.values()) == CASES
        and len(ids) == len(splits) < max(ids) <= LAST_ID
        and sorted(names) == sorted(own)
    )


def _row(line):
    network, parameters, seconds, *dice = line.rsplit(maxsplit=2 + len(GROUPS))
    return {
        "network": network.strip(),
        "parameters_m": float(parameters),
        "seconds": int(seconds),
        "dice": dict(zip(GROUPS, map(float, dice), strict=True)),
    }


ROWS: tuple[dict, ...] = tuple(map(_row, _FIGURES.strip().splitlines()))
NOTE = (
    f"Reported: by {SOURCE}, on TotalSegmentator-V2.\n"
    "The paper does not say how it averages: its overall "
    f"{ROWS[-1]['dice']['overall']:.2f} is not the mean of its groups.\n"
    "Which classes are in a group is not published either."
)


def table_rows(groups: Iterable[str]) -> list[list[str]]:
    """Return the rows of a table whose columns are these groups of `GROUPS`."""
    groups = list(groups)
    return [["Reported, by the authors", *("" for _ in groups)]] + [
        [f"  {row['network']}", *(f"{row['dice'][name]:.2f}" for name in groups)]
        for row in ROWS
    ]
