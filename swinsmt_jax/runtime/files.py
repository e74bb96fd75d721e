"""Files that are whole or not there."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from swinsmt_jax import checks


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Give a temporary name; on success rename it to `path`, else remove it."""
    partial = path.with_name(f".partial-{os.getpid()}-{path.name}")
    try:
        yield partial
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Replace a text file as a whole: a reader sees the old or the new one.

    Raises:
        UserError: for a file that cannot be written.
    """
    try:
        with replacing(path) as partial:
            partial.write_text(text, encoding="utf-8")
    except OSError as error:
        raise checks.UserError(
            f"{path} cannot be written: {error.strerror}; make room or mend the "
            "folder's permissions, or choose another --workdir."
        ) from error
