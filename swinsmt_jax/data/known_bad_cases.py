"""Cases of TotalSegmentator v2 that public reports name, with source and reason."""

import csv
from collections.abc import Collection
from importlib import resources

from absl import logging

from swinsmt_jax import checks
from swinsmt_jax.class_map import V2, ClassMap

KNOWN = "known"  # stands for them in --exclude


def reasons() -> dict[str, str]:
    """Return {case: reason and source}."""
    table = resources.files("swinsmt_jax.data") / "known_bad_cases.csv"
    rows = csv.DictReader(table.read_text(encoding="utf-8").splitlines())
    return {
        row["case"]: f"{row['structures'] or 'image'}: {row['reason']} "
        f"(release {row['release']}, {row['source']})"
        for row in rows
    }


def in_dataset(listed: Collection[str], classes: ClassMap) -> list[str]:
    """Return the cases that a dataset lists.

    Raises:
        UserError: for a dataset with other classes than TotalSegmentator's.
    """
    checks.require(
        classes.names == V2.names,
        f"exclude is {KNOWN!r}, which stands for cases of TotalSegmentator v2, but the "
        f"dataset has the classes {checks.few(classes.names[1:])}; name its cases.",
    )
    found = [name for name in reasons() if name in listed]
    logging.info(
        "%d of %d known bad cases are listed, and left out: %s",
        len(found),
        len(reasons()),
        checks.few(found) if found else "-",
    )
    return found
