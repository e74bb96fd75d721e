"""An output folder that several processes share, and its summary.json."""

import time
from collections.abc import Generator, Iterable, Mapping
from pathlib import Path

from absl import logging

from swinsmt_jax.runtime import files
from swinsmt_jax.runtime.files import Claim

SUMMARY = "summary.json"
LOCK = ".lock"  # of the summary; with a name behind it, of a scan
PATIENCE = 1.0  # seconds between checks of what others work on


def read(output: Path) -> dict[str, dict]:
    """Return {name: entry} of the summary; {} if it cannot be parsed."""
    try:
        found = files.read_json(output / SUMMARY)
    except (OSError, ValueError):
        return {}
    found = found.items() if isinstance(found, dict) else ()
    return {name: entry for name, entry in found if isinstance(entry, dict)}


def tell(output: Path, name: str, entry: dict) -> None:
    """Replace the entry of one scan; those of other processes stay.

    Raises:
        UserError: if the summary cannot be written.
    """
    file = output / SUMMARY
    with files.writable(file), files.claimed(output / LOCK, wait=True):
        files.remove_partial(output, of=SUMMARY)
        files.write_json(file, {**read(output), name: entry})


def finish_summary(output: Path, entries: Mapping[str, dict]) -> None:
    """Put the entries of scans in their order, behind other entries.

    An existing entry stays. Without file locks an entry may be missing.

    Raises:
        UserError: if the summary cannot be written.
    """
    file = output / SUMMARY
    with files.writable(file), files.claimed(output / LOCK, wait=True):
        found = read(output)
        rest = {name: entry for name, entry in found.items() if name not in entries}
        own = {name: found.get(name, entry) for name, entry in entries.items()}
        files.write_json(file, rest | own)


def turns(
    output: Path, names: Iterable[str]
) -> Generator[tuple[str, Claim], None, None]:
    """Yield each name once, while no other process works on it.

    Taken names come last, once they are free, because their process may have failed.
    Close this generator, or a name stays taken.
    """
    waiting, told = list(names), False
    while waiting:
        taken = []
        for name in waiting:
            with files.claimed(output / f"{LOCK}-{name}") as claim:
                if claim is Claim.BUSY:
                    taken.append(name)
                else:
                    yield name, claim
        if taken == waiting:
            if not told:
                logging.info("waiting for other processes: %s", ", ".join(taken))
                told = True
            time.sleep(PATIENCE)
        waiting = taken
