"""Voxel sides in mm from users: one, three, or 0 for each scan's own."""

from collections.abc import Sequence
from typing import Annotated

from swinsmt_jax import checks
from swinsmt_jax.checks import Rule


def _is_spacing(sides):
    if isinstance(sides, float):
        return 0 <= sides <= 100
    return len(sides) == 3 and all(0 < side <= 100 for side in sides)


Sides = float | tuple[float, ...]
Spacing = Annotated[
    Sides, Rule("be one side in [0, 100] mm, or three sides above 0", _is_spacing)
]


def parse(name: str, text: str) -> Sides:
    """Read "1.5", or "1.5,1.5,3": sides to the right, front and head.

    Raises:
        UserError: for anything else; the message begins with `name`.
    """
    try:
        sides = tuple(float(part) for part in str(text).strip("()[] ").split(","))
    except ValueError:
        sides = ()
    checks.require(
        len(sides) in (1, 3) and _is_spacing(sides if len(sides) == 3 else sides[0]),
        f"{name} is {text!r}, but must be the side of a voxel in mm up to 100, three "
        "sides such as 1.5,1.5,3, or 0, which keeps each scan's own.",
    )
    return plain(sides if len(sides) == 3 else sides[0])


def plain(sides: float | Sequence[float]) -> Sides:
    """Return one number for a cube, otherwise a tuple."""
    if isinstance(sides, Sequence):
        sides = tuple(map(float, sides))
        return sides[0] if len(set(sides)) == 1 else sides
    return float(sides)


def text(sides: Sides) -> str:
    """Write sides as `parse` reads them."""
    sides = sides if isinstance(sides, tuple) else (sides,)
    return ",".join(f"{side:g}" for side in sides)
