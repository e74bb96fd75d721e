"""The copies of a compiled program, by the operation that they belong to."""

import math
import re

from benchmarks.roofline import COPY, stage_of

MOST, FEW = 10, 3  # operations by bytes, by number
HEADER = re.compile(r"(ENTRY )?%?([\w.\-]+) \(.*\{$")
INSTRUCTION = re.compile(r"\s+(?:ROOT )?%?([\w.\-]+) = (.*)")
CALLED = re.compile(r"(?:body|condition|to_apply|calls|\w+_computation)=%?([\w.\-]+)")
BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"')
OPERAND = re.compile(r"(?:^|%)([a-z][\w.\-]*)(?=[,)])")  # the first one
SHAPE = re.compile(r"[a-z]+(\d*)\w*\[([\d,]*)\]")
HOPS = 8  # operands back to one that has a name
SEVERAL = ("tuple", "call", "conditional")  # whose first operand tells nothing


def copies(text: str, *, most: int = MOST) -> list[dict]:
    """Return the sum of all copies, and operations with the most by bytes, then number.

    A row has `stage`, `operation` (the end of its name in the program; that of the
    copied operand, if the copy has none), `copies` and `bytes` that are written, both
    of one run: a loop's count as often as it runs, if the program says that.

    Args:
        text: of the compiled program.
        most: operations by bytes; those by number are few, and none of the others.
    """
    computations, entry = _computations(text)
    runs = _runs(computations, entry)
    total, rows = {"copies": 0, "bytes": 0}, {}
    for name, instructions in computations.items():
        for own, rest in instructions.items():
            if name not in runs or not _is_copy(own, rest):
                continue
            key = _place(rest, instructions)
            for row in (total, rows.setdefault(key, {"copies": 0, "bytes": 0})):
                row["copies"] += runs[name]
                row["bytes"] += runs[name] * _bytes(rest)
    largest = sorted(rows, key=lambda key: -rows[key]["bytes"])[:most]
    numerous = sorted(rows, key=lambda key: -rows[key]["copies"])[:FEW]
    named = [("all", ""), *largest, *(key for key in numerous if key not in largest)]
    return [
        {"stage": stage, "operation": operation} | rows.get((stage, operation), total)
        for stage, operation in named
    ]


def line(row: dict) -> str:
    """Format a row of `copies`."""
    return (
        f"{row['stage']:12} {row['operation']:40} {row['copies']:6} copies "
        f"{row['bytes'] / 1e6:10.3f} MB"
    )


def _computations(text):
    """Return ({computation: {instruction: the rest of its line}}, the entry's name)."""
    found, entry, now = {}, None, {}
    for own in text.splitlines():
        header, instruction = HEADER.match(own), INSTRUCTION.match(own)
        if instruction:
            now[instruction[1]] = instruction[2]
        elif header:
            now = found.setdefault(header[2], {})
            entry = header[2] if header[1] else entry
    return found, entry


def _runs(computations, entry):
    """Return how often each computation runs; a fusion's is none of its own."""
    runs, waiting = {}, [(entry, 1)]
    while waiting:
        name, times = waiting.pop()
        runs[name] = runs.get(name, 0) + times
        for rest in computations.get(name, {}).values():
            if _opcode(rest) in ("fusion", "reduce", "scatter", "sort", "map"):
                continue
            trips = TRIPS.search(rest) if _opcode(rest) == "while" else None
            often = times * (int(trips[1]) if trips else 1)
            branches = ",".join(BRANCHES.findall(rest)).replace("%", "").split(",")
            called = [*CALLED.findall(rest), *(b.strip() for b in branches if b)]
            waiting += [(other, often) for other in called]
    return runs


def _opcode(rest):
    found = re.search(r"[\])}] ([a-z][\w\-]*)\(", rest)
    return found[1] if found else ""


def _is_copy(name, rest):
    opcode = _opcode(rest)
    is_kernel = COPY.fullmatch(re.sub(r"\W", "_", name)) is not None
    return opcode in ("copy", "copy-start") or (opcode == "fusion" and is_kernel)


def _place(rest, instructions):
    """Return (stage, end of the operation's name) that a copy belongs to."""
    scope, left = _scope(rest), HOPS
    while not scope and left and _opcode(rest) not in SEVERAL:
        operand = OPERAND.search(rest.partition(f" {_opcode(rest)}(")[2])
        rest = instructions.get(operand[1], "") if operand else ""
        scope, left = _scope(rest), left - 1
    return stage_of(scope), scope.rsplit("/", 1)[-1] or "unknown"


def _scope(rest):
    found = re.search(r'op_name="([^"]*)"', rest)
    return found[1] if found else ""


def _bytes(rest):
    """Return the bytes of an instruction's result, of the first part of a tuple."""
    bits, sides = SHAPE.search(rest).groups()
    return math.prod(map(int, filter(None, sides.split(",")))) * int(bits or 8) // 8
