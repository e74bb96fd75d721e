"""What tracing costs, and how to avoid it."""

import contextlib
import functools
import gc
from collections.abc import Iterator

import jax

# A function that a network calls many times on operands of one shape is traced once,
# and its operations are put where it is called: the program stays the same. It may
# depend on nothing but its arguments.
traced_once = functools.partial(jax.jit, inline=True)


@contextlib.contextmanager
def without_collection() -> Iterator[None]:
    """Pause garbage collection: nearly all of the objects that tracing makes stay."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
