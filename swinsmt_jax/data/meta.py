"""Tables of cases and their splits; meta.csv as in TotalSegmentator-V2."""

import csv
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from swinsmt_jax import checks
from swinsmt_jax.runtime import files

SPLITS = ("train", "val", "test")
META = "meta.csv"  # separated by semicolons; image_id, split
RESERVED = (META, "store.json", "report.json", "report.html")  # files of a store


class EmptySplitError(checks.UserError):
    """A dataset or a store has no case of the requested split."""


def collect(
    entries: Iterable[tuple[str, Any, str]],
    *,
    refused: dict[str, str] | None = None,
) -> dict[str, str]:
    """Return {case id: split} from a table's entries (place in the table, id, split).

    With `refused`, unusable entries do not raise: it collects {case or place: reason},
    and the others are taken. No entry of a repeated id is taken, because its split is
    unknown.

    Raises:
        UserError: for a repeated id or one that is not a plain folder name, and an
            unknown split.
    """
    splits = {}
    for place, name, split in entries:
        used = place
        try:
            require_id(f"{place}: the id of the case", name)
            used = name
            checks.require(
                name not in splits,
                f"{place} lists the case {name!r} more than once; remove one of them.",
            )
            checks.one_of(f"the split of {name!r} on {place}", split, SPLITS)
            splits[name] = split
        except checks.UserError as error:
            if refused is None:
                raise
            refused[used] = str(error)
    return {n: split for n, split in splits.items() if n not in (refused or {})}


def require_id(what: str, name: Any) -> None:
    """Raise `UserError` unless `name` can name a case's folder in a store."""
    checks.file_name(what, name)
    checks.require(
        name.lower() not in RESERVED,
        f"{what} is {name!r}, but must be the plain name of a folder, and none of "
        f"{', '.join(RESERVED)}, which are files of a store. Rename the case.",
    )


def read(root: Path, *, refused: dict[str, str] | None = None) -> dict[str, str]:
    """Read meta.csv as {case id: split}, in file order; see `collect`.

    Raises:
        UserError: for another file than such a table, and as `collect`.
    """
    path = root / META
    checks.require(
        path.is_file(), f"{path} does not exist, but names the split of every case."
    )
    columns, rows = _table(path)
    needed = ("image_id", "split")
    for column in needed:
        checks.require(
            column in columns,
            f"{path} has the columns {columns}, but needs {column!r}; columns are "
            "separated by semicolons.",
        )
    entries: Iterable[Any] = (
        (f"line {n} of {path}", *((row[c] or "").strip() for c in needed))
        for n, row in rows.items()
    )
    return collect(entries, refused=refused)


def add(root: Path, splits: dict[str, str]) -> None:
    """Add cases {id: split} to meta.csv, creating it if absent; other rows stay.

    Like the original, the file has a byte-order mark. It appears when complete.
    """
    path = root / META
    columns, rows = ["image_id", "split"], []
    if path.is_file():
        columns, found = _table(path)
        rows = [r for r in found.values() if r["image_id"] not in splits]
    rows += [{"image_id": name, "split": split} for name, split in splits.items()]
    with files.replacing(path) as partial:
        with partial.open("w", encoding="utf-8-sig", newline="") as file:
            writer = csv.writer(file, delimiter=";")
            writer.writerow(columns)
            for row in rows:
                fields = [row.get(column) for column in columns]
                writer.writerow([*fields, *row.get(None, ())])


def _table(path):
    """Return the columns of meta.csv, and {line: row} of non-empty rows."""
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file, delimiter=";")
            columns = list(reader.fieldnames or ())
            lines = [(reader.line_num, row) for row in reader]
    except (UnicodeDecodeError, csv.Error) as error:
        raise checks.UserError(
            f"{path} cannot be read: {error}; save it as CSV in UTF-8."
        ) from error
    for _, row in lines:
        if not any(map(str.strip, row.get(None, ()))):  # behind the last column
            row.pop(None, None)
    return columns, {
        number: row
        for number, row in lines
        if any(str(field or "").strip() for field in row.values())
    }
