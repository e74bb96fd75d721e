"""docs/numbers.md says what this package does, and what its protocols do."""

import re
from pathlib import Path

import pytest

from benchmarks import conventions, grids
from swinsmt_jax.evaluation.conventions import CONVENTIONS

PAGE = (Path(__file__).resolve().parents[2] / "docs/numbers.md").read_text()


def table(name):
    """Return the rows of a table, by their first cell."""
    (text,) = re.findall(f"<!-- {name} -->\n(.*?)<!-- end -->", PAGE, re.DOTALL)
    rows = [line.strip("|").split("|") for line in text.splitlines()]
    rows = [[cell.strip() for cell in row] for row in rows]
    return {first: rest for first, *rest in rows}


@pytest.mark.parametrize("protocol", [None, *CONVENTIONS])
def test_each_protocol_has_the_row_of_its_tool(protocol):
    title = conventions.TOOLS[protocol][0] if protocol else "swinsmt_jax"
    (row,) = [row for name, row in table("masks").items() if name.startswith(title)]
    found = conventions.mask_row(conventions.by_protocol(protocol))
    assert found == [cell.replace("refused", "none") for cell in row]


def test_our_grid_and_windows_are_those_of_the_page():
    assert table("resamplers")["swinsmt_jax"] == grids.row(grids.ours)
    header, _, *rows = table("windows").items()
    column = header[1].index("swinsmt_jax")
    assert len(rows) == len(grids.CASES)
    for case, (_, row) in zip(grids.CASES, rows, strict=True):
        assert row[column] == grids.starts(grids.our_windows, case)
