"""The memory of the host: what is free, and how freed blocks go back to it."""

import ctypes
import functools
import os
import sys
from pathlib import Path

from swinsmt_jax import checks

MEMINFO = Path("/proc/meminfo")
CGROUP = Path("/sys/fs/cgroup")  # of a container
# Options of glibc's mallopt, and bytes.
LARGE_BLOCK = (-3, 2**22)  # M_MMAP_THRESHOLD: from here on a block is mapped alone
FREE_AT_TOP = (-1, 2**24)  # M_TRIM_THRESHOLD: so much is kept for small blocks


def available() -> int | None:
    """Return the bytes that this process can still use; None if unknown."""
    try:
        known = dict(line.split(":") for line in MEMINFO.read_text().splitlines())
        free = int(known["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):
        return None
    try:
        limit = int((CGROUP / "memory.max").read_text())
        used = int((CGROUP / "memory.current").read_text())
        facts = (CGROUP / "memory.stat").read_text().split()
        cached = int(facts[facts.index("inactive_file") + 1])
    except (OSError, KeyError, ValueError):  # no container, or one without a limit
        return free
    return min(free, max(0, limit - used + cached))


def require(what: object, needed: int) -> None:
    """Raise `UserError` if `what` needs more bytes than there are.

    Linux would end the process, and with it all scans after this one.
    """
    free = available()
    checks.require(
        free is None or needed <= free,
        f"{what} needs at least {needed / 1e9:.1f} GB of memory, but "
        f"{(free or 0) / 1e9:.1f} GB are free; crop it, or give the process more.",
    )


@functools.cache
def return_freed_blocks() -> None:
    """Make glibc return large blocks to the system when they are freed.

    By itself it raises the size from which it does so to 32 MB, and then keeps the
    freed logits and temporary arrays of windows.
    MALLOC_MMAP_THRESHOLD_ and MALLOC_TRIM_THRESHOLD_ in the environment win.
    """
    given = {"MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_", "GLIBC_TUNABLES"}
    if sys.platform != "linux" or given & set(os.environ):
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # musl has none
    if mallopt is not None:
        mallopt(*LARGE_BLOCK)
        mallopt(*FREE_AT_TOP)
