"""The free memory of the host, checked before the sizes in a header are trusted."""

from pathlib import Path

from swinsmt_jax import checks

MEMINFO = Path("/proc/meminfo")
CGROUP = Path("/sys/fs/cgroup")  # of a container


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
