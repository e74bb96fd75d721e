"""Tables as CSV, in which no cell is a formula."""

import csv
import io
import re
from collections.abc import Iterable

FORMULA = ("=", "+", "-", "@", "\t", "\r")  # what spreadsheets calculate
NUMBER = re.compile(r"[+-]?\d+(\.\d+)?")


def as_csv(rows: Iterable[Iterable[object]]) -> str:
    """Return rows as CSV; texts that a spreadsheet would calculate get a ' before."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerows([_cell(value) for value in row] for row in rows)
    return text.getvalue()


def read_cell(text: str) -> str:
    """Return what a text was before `as_csv`."""
    return text[1:] if text.startswith("'") and text[1:].startswith(FORMULA) else text


def _cell(value):
    if not isinstance(value, str) or NUMBER.fullmatch(value):
        return value
    return f"'{value}" if value.startswith(FORMULA) else value
