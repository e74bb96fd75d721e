"""The source of a stored case: its files, their sizes and content hashes."""

import hashlib
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

LENGTH = 16  # hexadecimal digits kept of a SHA-256


def record(files: Sequence[Path], *, root: Path) -> dict[str, dict]:
    """Return the record of a case's files, by paths from `root`.

    Returns:
        `source`, {path: [bytes, hash]}, and `times`, {path: time of its last change in
        ns}, which does not describe the content.
    """
    names = {os.path.relpath(file, root): file for file in files}
    return {
        "source": {n: [f.stat().st_size, _digest(f)] for n, f in names.items()},
        "times": {name: file.stat().st_mtime_ns for name, file in names.items()},
    }


def changes(
    facts: Mapping,
    files: Sequence[Path],
    *,
    root: Path,
    made: int,
    whole: bool,
) -> list[str]:
    """Return the names of files added, removed or changed since a case was made.

    Files with the recorded size and time are read only if they arrived later.

    Args:
        facts: contain the result of `record`; in earlier versions only the sizes.
        files: from which the case would be made now.
        root: folder of the dataset.
        made: time in ns at which the case was complete.
        whole: read all files.
    """
    recorded, times = facts.get("source", []), facts.get("times", {})
    if not isinstance(recorded, Mapping):
        same = [file.stat().st_size for file in files] == list(recorded)
        return [] if same else ["sizes of its files"]
    now = {os.path.relpath(file, root): file for file in files}
    differing = list(recorded.keys() ^ now.keys())
    for name in recorded.keys() & now.keys():
        (size, digest), found = recorded[name], now[name].stat()
        doubt = found.st_mtime_ns != times.get(name) or found.st_ctime_ns >= made
        if size != found.st_size or (doubt or whole) and digest != _digest(now[name]):
            differing.append(name)
    return sorted(differing)


def _digest(file):
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()[:LENGTH]
