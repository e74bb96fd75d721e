"""Messages for user errors: argument, value, rule and remedy."""

import contextlib
import dataclasses
import difflib
import math
import numbers
import os
import re
import types
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Annotated, Any, NamedTuple

import numpy as np


class UserError(ValueError):
    """Bad input that the user can fix; scripts print its message without traceback.

    What a file or its name holds may enter the message: no terminal obeys it.
    """

    def __init__(self, message: object = ""):
        super().__init__(printable(str(message)))


def printable(text: str, *, keep: str = "") -> str:
    """Return a text with what would steer a terminal, but `keep`, written out."""
    if text.isprintable():
        return text
    kept = (c if c.isprintable() or c in keep else repr(c)[1:-1] for c in text)
    return "".join(kept)


def require(condition: bool, message: str) -> None:
    """Raise `UserError(message)` unless the condition holds."""
    if not condition:
        raise UserError(message)


@contextlib.contextmanager
def named(what: object) -> Iterator[None]:
    """Begin the message of a `UserError` with what it is about, such as a scan."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{what}: {error}") from error


def finite(what: object, arrays: Mapping[str, np.ndarray]) -> None:
    """Raise `UserError` unless all parameters `arrays` of `what` are finite."""
    bad = [name for name, array in arrays.items() if not np.isfinite(array).all()]
    require(
        not bad,
        f"{what} has {len(bad)} parameters with values that are NaN or infinite, such "
        f"as {bad[0] if bad else ''}: the training diverged, or the file is damaged. "
        "Take an earlier checkpoint, or train with a lower learning rate.",
    )


def one_of(name: str, value: object, choices: Iterable) -> None:
    """Raise `UserError` unless `value` is one of `choices`, naming the nearest one."""
    choices = list(choices)
    if value in choices:
        return
    raise UserError(
        f"{name} is {value!r}, but must be one of "
        f"{', '.join(repr(c) for c in choices)}.{did_you_mean(value, choices)}"
    )


def pattern(name: str, value: str) -> None:
    """Raise `UserError` unless `value` is a regular expression."""
    try:
        re.compile(value)
    except re.error as error:
        raise UserError(
            f"{name} is {value!r}, which is not a regular expression: {error}."
        ) from error


def file_name(name: str, value: object) -> None:
    """Raise `UserError` unless `value` can name a file or a folder of any folder.

    The one rule for all names that become names of files: of classes and of cases.
    """
    require(
        isinstance(value, str)
        and value.strip() == value != ""
        and value.isprintable()
        and value[0] != "."
        and not set(value) & set("/\\:;")
        and len(value.encode()) <= MAX_NAME_BYTES,
        f"{name} is {value!r}, but must be the plain name of a folder or file, such as "
        f"'s0001': at most {MAX_NAME_BYTES} bytes, no leading dot, and none of "
        "/ \\ : ; or control characters. Rename it.",
    )


OVERALL = "overall"  # the column of all classes
COLUMNS = (OVERALL, "case", "classes", "missed", "false_positives", "seconds")


def group_name(where: str, name: object) -> None:
    """Raise `UserError` unless `name` can be a column beside that of all classes."""
    require(
        isinstance(name, str)
        and name.strip() == name != ""
        and name.isprintable()
        and name.casefold() not in COLUMNS,
        f"{where}: {name!r} is not a name for a group: it must be printable, without "
        f"spaces around it, and none of {', '.join(COLUMNS)}, which are other columns "
        "of the results. Rename it.",
    )


def divisors(number: int) -> list[int]:
    """Return the divisors of a number, in ascending order."""
    return [n for n in range(1, number + 1) if number % n == 0]


def divides(name: str, value: int, *, of: str, number: int) -> None:
    """Raise `UserError` unless `value` divides `number`, which is called `of`."""
    require(
        number % value == 0,
        f"{name} is {value}, but must divide {of} = {number}: take one of "
        f"{listed(divisors(number))}.",
    )


def listed(values: Iterable) -> str:
    """Return values as a list for a message: 1, 2, 4."""
    return ", ".join(map(str, values))


def few(names: Sequence[str]) -> str:
    """Return the first names, and how many there are: a, b, c, d, ... (9)."""
    return f"{', '.join(names[:4])}{', ...' if len(names) > 4 else ''} ({len(names)})"


def one_line(error: BaseException, limit: int = 200) -> str:
    """Return what an error says on one short line, or else its type."""
    return " ".join(str(error).split())[:limit] or type(error).__name__


def did_you_mean(value: object, choices: Iterable) -> str:
    """Return ' Did you mean ...?' for the nearest of `choices`, or ''."""
    near = difflib.get_close_matches(str(value), [str(c) for c in choices], n=1)
    return f" Did you mean {near[0]!r}?" if near else ""


def in_range(name: str, value: float, low: float, high: float) -> None:
    """Raise `UserError` unless `low <= value <= high`."""
    require(
        isinstance(value, (int, float)) and low <= value <= high,
        f"{name} is {value!r}, but must lie in [{low:g}, {high:g}].",
    )


def positive(name: str, value: int) -> None:
    """Raise `UserError` unless `value` is a whole number of at least 1."""
    require(
        isinstance(value, int) and not isinstance(value, bool) and value >= 1,
        f"{name} is {value!r}, but must be a whole number of at least 1.",
    )


class Within(NamedTuple):
    """A rule for a field: low <= value <= high."""

    low: float
    high: float

    def __call__(self, name: str, value: float) -> None:
        """Raise `UserError` unless the value obeys."""
        in_range(name, value, self.low, self.high)


class Rule(NamedTuple):
    """A rule for a field: `holds(value)`. `words` say what the value "must" do."""

    words: str
    holds: Callable[[Any], bool]

    def __call__(self, name: str, value: object) -> None:
        """Raise `UserError` unless the value obeys."""
        require(self.holds(value), f"{name} is {value!r}, but must {self.words}.")


def entries(count: int) -> Rule:
    """Return the rule that a tuple has this many entries."""
    return Rule(f"have {count} entries", lambda value: len(value) == count)


class Among(NamedTuple):
    """A rule for a field: one of the choices."""

    choices: tuple

    def __call__(self, name: str, value: object) -> None:
        """Raise `UserError` unless the value obeys."""
        one_of(name, value, self.choices)


Positive = Annotated[int, positive]
Positives = tuple[Positive, ...]
OneOrEach = Positive | Positives  # one number, or one for each of several parts
Share = Annotated[float, Within(0.0, 1.0)]


def each(value: int | tuple[int, ...]) -> tuple[int, ...]:
    """Return a `OneOrEach` as a tuple."""
    return (value,) if isinstance(value, int) else value


MAX_NAME_BYTES = 200  # file systems take 255 with what is added to a name
DTYPES = ("float32", "bfloat16")


def dtype_name(name: str, dtype: object) -> str:
    """Return "float32" or "bfloat16", also for jnp.bfloat16 and np.float32.

    Raises:
        UserError: for another dtype.
    """
    text = dtype if isinstance(dtype, str) else getattr(dtype, "__name__", str(dtype))
    one_of(name, text, DTYPES)
    return text


def typed_fields(group: str, config: Any) -> None:
    """Raise `UserError` unless each field of a dataclass has the type of its hint.

    Types are bool, int, float and str, a tuple[int, ...] of any of them, a number or a
    tuple of numbers, a mapping by names, or another dataclass, checked by itself.
    `Annotated` adds rules: functions of name and value that raise. Sequences become
    tuples, numbers of numpy Python's, and paths strings; floats are finite.

    Args:
        group: what the fields belong to, for the message: "model" in "model.depths".
        config: a dataclass, frozen or not.
    """
    hints = typing.get_type_hints(type(config), include_extras=True)
    for field in dataclasses.fields(config):
        name, value = field.name, getattr(config, field.name)
        value = _typed(f"{group}.{name}", value, hints[name])
        object.__setattr__(config, name, value)


_TYPES = {  # hint: (type of the values that are taken, words)
    bool: (bool, "True or False"),
    int: (numbers.Integral, "a whole number"),
    float: (numbers.Real, "a finite number"),
    str: (str, "a string"),
}


def _typed(name, value, hint):
    origin = typing.get_origin(hint)
    if origin is Annotated:
        value = _typed(name, value, hint.__origin__)
        for check in hint.__metadata__:
            check(name, value)
        return value
    if origin in (types.UnionType, typing.Union):  # int | tuple[int, ...]
        single, several = hint.__args__
        hint = single if isinstance(value, numbers.Real) else several
        return _typed(name, value, hint)
    if origin is tuple:
        return _typed_entries(name, value, hint.__args__[0])
    if origin is Mapping:
        require(
            isinstance(value, Mapping), f"{name} is {value!r}, but must be a mapping."
        )
        kind = hint.__args__[1]
        return {key: _typed(f"{name}.{key}", v, kind) for key, v in value.items()}
    if dataclasses.is_dataclass(hint):
        require(
            isinstance(value, hint),
            f"{name} is {value!r}, but must be {hint.__name__}.",
        )
        return value
    kind, words = _TYPES[hint]
    if hint is str and isinstance(value, os.PathLike):
        value = os.fspath(value)
    fits = isinstance(value, kind) and (hint is bool or not isinstance(value, bool))
    if hint in (int, float) and fits:
        value = hint(value)
        fits = math.isfinite(value)
    require(fits, f"{name} is {value!r}, but must be {words}.")
    return value


def _typed_entries(name, value, hint):
    several = None, "a number or a tuple of numbers"
    _, words = _TYPES.get(getattr(hint, "__origin__", hint), several)
    require(
        isinstance(value, Iterable) and not isinstance(value, (str, Mapping)),
        f"{name} is {value!r}, but must be a sequence, each entry of it {words}.",
    )
    value = tuple(value)
    return tuple(_typed(f"an entry of {name} {value}", v, hint) for v in value)


def spatial_shape(
    name: str,
    shape: Sequence[int],
    stride: int | Sequence[int],
    *,
    exact: Sequence[int] | None = None,
) -> None:
    """Raise `UserError` unless every side is a positive multiple of the stride.

    Args:
        name: what the shape belongs to, for the message.
        shape: spatial sides (D, H, W) in voxels.
        stride: total stride of the encoder, one number or one per side.
        exact: the only shape that the network takes, if its parameters depend on it;
            then the stride does not matter.
    """
    if exact is not None:
        require(
            tuple(shape) == tuple(exact),
            f"{name} has shape {tuple(shape)}, but this network accepts only {exact}: "
            "its parameters depend on the input shape in its config; change one or "
            "the other.",
        )
        return
    strides = (stride,) * len(shape) if isinstance(stride, int) else tuple(stride)
    if all(n > 0 and n % s == 0 for n, s in zip(shape, strides, strict=True)):
        return
    valid = tuple(max(1, -(-n // s)) * s for n, s in zip(shape, strides, strict=True))
    rule = stride if len(set(strides)) > 1 else strides[0]
    raise UserError(
        f"{name} has shape {tuple(shape)}, but every side must be a multiple of {rule},"
        f" the total stride of the encoder; the next valid shape is {valid}."
    )


def image_batch(shape: Sequence[int], *, channels: int) -> None:
    """Raise `UserError` unless a shape is [B, D, H, W, channels] of some samples."""
    require(
        len(shape) == 5 and shape[-1] == channels and shape[0] > 0,
        f"input has shape {tuple(shape)}, but must be [B, D, H, W, {channels}] "
        "(channels last), with at least one sample.",
    )
