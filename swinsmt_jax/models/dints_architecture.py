"""The architecture of DiNTS: which paths join the feature maps, and what each does.

It is a tuple of rows, one for each block. A row has a character for each path from the
block's feature maps to the next ones, 3 depths - 2 in all: the operation, 0 to 4, or
"." where there is no path.
"""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from swinsmt_jax import checks
from swinsmt_jax.runtime.files import read_json

PUBLISHED = Path(__file__).with_name("dints_published.json")
OPERATIONS = "01234"
NO_PATH = "."


class Cell(NamedTuple):
    """A path from one block's feature map to one of the next block's.

    Attributes:
        path: its number, by target and then by source.
        source, target: depths, 0 the finest.
        operation: a character of `OPERATIONS`.
    """

    path: int
    source: int
    target: int
    operation: str


def cells(row: str) -> Iterator[Cell]:
    """Yield the cells of a block from its row of an architecture."""
    for path, operation in enumerate(row):
        target, step = divmod(path + 1, 3)
        if operation != NO_PATH:
            yield Cell(path, target - 1 + step, target, operation)


def read(path: Path) -> tuple[str, ...]:
    """Return the rows of an architecture file.

    It is JSON with MONAI's arrays, [blocks, 3 depths - 2]: `arch_code_a`, 1 for each
    path that exists, and `arch_code_c`, its operation, 0 to 4; or, as in Auto3DSeg,
    `code_a` and `code_c`. `node_a`, `num_blocks` and `num_depths` may be there, and
    must then agree.

    Raises:
        UserError: if it is not such a file.
    """
    where = f"the architecture file {path}"
    try:
        content = read_json(path)
    except (OSError, ValueError) as error:
        raise checks.UserError(
            f"model.architecture is {str(path)!r}, which cannot be read as JSON "
            f"({checks.one_line(error)}); name a file with the arrays arch_code_a and "
            "arch_code_c, or leave it at 'published'."
        ) from error
    checks.require(isinstance(content, Mapping), f"{where} must hold a JSON object.")
    exists, operations = (_array(content, f"code_{x}", where) for x in "ac")
    checks.require(
        exists.shape == operations.shape,
        f"{where} has arch_code_a of shape {exists.shape} and arch_code_c of shape "
        f"{operations.shape}, but they must have one: [blocks, 3 depths - 2].",
    )
    checks.require(
        set(exists.flat) <= {0, 1}, f"{where}: arch_code_a must hold only 0 and 1."
    )
    checks.require(
        set(operations[exists == 1]) <= set(map(int, OPERATIONS)),
        f"{where}: arch_code_c must hold operations from 0 to 4 where a path exists.",
    )
    rows = tuple(
        "".join(str(int(o)) if e else NO_PATH for e, o in zip(*block, strict=True))
        for block in zip(exists, operations, strict=True)
    )
    check(rows, where)
    agree = {
        "num_blocks": len(rows),
        "num_depths": depths(rows),
        "node_a": _nodes(rows).tolist(),
    }
    for name, value in agree.items():
        checks.require(
            content.get(name, value) == value,
            f"{where}: {name} is {content.get(name)}, but the paths of arch_code_a "
            f"make it {value}.",
        )
    return rows


def _array(content, name, where):
    """Return the numbers [rows, columns] of an array of an architecture file."""
    value = content.get(f"arch_{name}", content.get(name))
    try:
        array = np.array(value, float)
    except (TypeError, ValueError, OverflowError):  # not numbers, or uneven rows
        array = np.empty(0)
    checks.require(
        array.ndim == 2,
        f"{where} must have an array arch_{name} of numbers, [blocks, 3 depths - 2].",
    )
    return array


def depths(rows: Sequence[str]) -> int:
    """Return the number of resolutions."""
    return (len(rows[0]) + 2) // 3


def _nodes(rows):
    """Return which nodes are used, of each column and depth: 0 or 1."""
    nodes = np.zeros((len(rows) + 1, depths(rows)), int)
    nodes[0, [cell.source for cell in cells(rows[0])]] = 1
    for block, row in enumerate(rows, start=1):
        nodes[block, [cell.target for cell in cells(row)]] = 1
    return nodes


def check(rows: Sequence[str], where: str) -> None:
    """Raise `UserError` unless rows are an architecture that is connected."""
    lengths = {len(row) for row in rows}
    checks.require(
        len(lengths) == 1 and min(lengths) % 3 == 1,
        f"{where} has {len(rows)} blocks of {checks.listed(sorted(lengths)) or 'no'} "
        "paths, but must have at least one block, and 3 depths - 2 paths in each: 4, 7,"
        " 10.",
    )
    reached = set(range(depths(rows)))  # inputs exist at every depth
    for block, row in enumerate(rows):
        unknown = set(row) - {NO_PATH, *OPERATIONS}
        checks.require(
            not unknown and set(row) != {NO_PATH},
            f"{where}: block {block} is {row!r}, but must have an operation from 0 to "
            f"4 for each path, or {NO_PATH!r} for none, and at least one path.",
        )
        for cell in cells(row):
            checks.require(
                cell.source in reached,
                f"{where}: path {cell.path} of block {block} is not connected: it "
                f"starts at depth {cell.source}, where no path of block {block - 1} "
                "ends. Take the path out, or add one before it.",
            )
        reached = {cell.target for cell in cells(row)}
