"""What several processes do together: wait, gather, share work and fail.

Each process runs the same script. Only the first one writes files and prints. Work that
may fail in one process runs in `run_on_all`, so that no process waits forever.
"""

import contextlib
import itertools
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NoReturn, TypeVar, cast

import jax
import numpy as np
from jax._src import distributed
from jax.experimental import multihost_utils
from orbax.checkpoint import multihost

from swinsmt_jax import checks
from swinsmt_jax.runtime import plain, statuses

T = TypeVar("T")

LONGEST_WAIT_MS = 24 * 3600 * 1000  # for the slowest process, such as in validation

_barriers = itertools.count()


class SharedError(checks.UserError):
    """A `UserError` that all processes raise, for the first one to print.

    Attributes:
        status: exit status of the script.
    """

    status = statuses.REFUSED


class SomeFailedError(SharedError):
    """Of many cases some could not be done; all processes raise it."""

    status = statuses.SOME_FAILED


def is_first() -> bool:
    """Whether this is the process that writes files and talks to the user."""
    return jax.process_index() == 0


def barrier() -> None:
    """Wait until all processes are here.

    Needed before collectives of processes that may be minutes apart: on CPU, these wait
    for 30 seconds only. A single process does not wait.
    """
    if jax.process_count() == 1:
        return
    wait = multihost.get_barrier_sync_fn()
    wait(key=f"swinsmt_jax.{next(_barriers)}", timeout_ms=LONGEST_WAIT_MS)


def compiled(function: jax.stages.Wrapped, *arguments: Any) -> jax.stages.Compiled:
    """Compile for these arguments in all processes before any of them continues.

    Some find the program in the cache and some do not. JAX_DISABLE_JIT does not hold
    here: what is compiled ahead says how much memory it takes.
    """
    with jax.disable_jit(False):
        program = function.lower(*arguments).compile()
    barrier()
    return program


def gather(value: T) -> list[T]:
    """Return the value of each process, in their order; all must call this.

    Values travel as `plain` text, in which a stranger's program cannot hide, and are
    small: each process gets all of them.

    Raises:
        SharedError: if another process sent something else.
    """
    if jax.process_count() == 1:
        return [value]
    barrier()
    own = np.frombuffer(plain.dumps(value).encode(), np.uint8)
    sizes = multihost_utils.process_allgather(np.int32(own.size)).ravel()
    padded = np.zeros(1 << int(sizes.max() - 1).bit_length(), np.uint8)  # few shapes
    padded[: own.size] = own
    found = np.asarray(multihost_utils.process_allgather(padded))
    found = found.reshape(len(sizes), -1)
    try:
        return [
            cast(T, plain.loads(part[:size].tobytes()))
            for part, size in zip(found, sizes, strict=True)
        ]
    except ValueError as error:
        raise SharedError(
            f"what a process sent cannot be read ({checks.one_line(error)}); start all "
            "processes with the same version."
        ) from error


def run_on_all(function: Callable[[], T]) -> T:
    """Call in all processes; return this one's result if none raised a `UserError`.

    Raises:
        SharedError: in all processes, what the first one that failed has to say. A
            single process raises its own `UserError`.
        Interrupted: in all, if one has raised it.
    """
    if jax.process_count() == 1:
        return function()
    result, message, ended = None, None, None
    try:
        result = function()
    except checks.UserError as error:
        message = str(error)
    except statuses.Interrupted as error:
        ended = {"number": int(error.number), "step": error.step, "stop": error.stop}
    found = gather((message, ended))
    for text, _ in found:
        if text is not None:
            raise SharedError(text)
    for _, signal in found:
        if signal is not None:
            raise statuses.Interrupted(**signal)
    return cast(T, result)


def on_first(function: Callable[[], object]) -> None:
    """Call only in the first process; the others wait, and raise its `UserError`."""
    run_on_all(lambda: function() if is_first() else None)


def shard(items: Sequence[T]) -> Sequence[T]:
    """Return this process's part of the items: every n-th for n processes."""
    return items[jax.process_index() :: jax.process_count()]


def unshard(own: Sequence[T]) -> list[T]:
    """Return what all processes made of their `shard` of items, in the items' order."""
    parts = gather(list(own))
    longest = max(len(part) for part in parts)
    return [part[i] for i in range(longest) for part in parts if i < len(part)]


def require_same(values: Mapping[str, object]) -> None:
    """Raise `SharedError` unless all processes have the same values by name."""
    parts = gather(dict(values))
    differing = [
        f"{name} is {first!r} in process 0, but {part.get(name)!r} in process {i}"
        for name, first in parts[0].items()
        for i, part in enumerate(parts)
        if part.get(name) != first
    ]
    if differing:
        raise SharedError(
            f"the processes do not run the same experiment: {'; '.join(differing[:3])}."
            " Start all with the same flags and the same data."
        )


def abandon(status: int) -> NoReturn:
    """End this process at once, without waiting for the others, who may hang.

    They are ended by the launcher, or by JAX when it misses the heartbeat.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def leave(status: int, *, within: float = 30) -> NoReturn:
    """End this process together with the others: a launcher ends the slower ones.

    One that the others do not follow within so many seconds goes alone.
    """
    with contextlib.suppress(jax.errors.JaxRuntimeError):
        coordination().wait_at_barrier("swinsmt_jax.leave", int(within * 1000))
        jax.distributed.shutdown()
    abandon(status)


def coordination() -> Any:
    """Return JAX's client of its coordinator, which knows keys and barriers."""
    return distributed.global_state.client


def several() -> bool:
    """Whether this process has joined others. Does not touch the devices."""
    return jax.distributed.is_initialized() and jax.process_count() > 1
