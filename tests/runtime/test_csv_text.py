"""Tables that spreadsheets open."""

import csv
import io

from swinsmt_jax.runtime import csv_text


def test_no_cell_is_a_formula_and_all_texts_come_back():
    texts = ["=1+1", "+a", "-b", "@c", "\tx", "liver", "'quoted'", "a=b", ""]
    text = csv_text.as_csv([["class", "value"], *([name, -1.5] for name in texts)])
    _, *rows = csv.reader(io.StringIO(text, newline=""))
    assert not any(name.startswith(csv_text.FORMULA) for name, _ in rows)
    assert [csv_text.read_cell(name) for name, _ in rows] == texts
    assert {value for _, value in rows} == {"-1.5"}  # numbers stay as they are
