"""Tables as CSV, in which no cell is a formula."""

import csv
import io
from collections.abc import Iterable

FORMULA = ("=", "+", "-", "@", "\t", "\r")  # what spreadsheets calculate


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
    formula = isinstance(value, str) and value.startswith(FORMULA)
    return f"'{value}" if formula else value
