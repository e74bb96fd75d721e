"""Files and folders that are whole or not there, and the lock of a folder."""

import contextlib
import enum
import errno
import glob
import json
import os
import platform
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import filelock
from absl import logging

from swinsmt_jax import checks

PARTIAL = ".partial-"  # begins the names of what a killed process left half-written
BEFORE = ".before"  # a folder that is being replaced
NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP)
LITTER = ("thumbs.db", "desktop.ini", ".ds_store")  # that systems leave in folders
NO_FLUSH = (errno.EINVAL, errno.EOPNOTSUPP)  # of folders, on some network drives


class Claim(enum.Enum):
    """How a process found what it wanted to work on."""

    FREE = enum.auto()
    BUSY = enum.auto()  # another process works on it
    LEFT = enum.auto()  # another one did, and was killed


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Give a temporary path; on success, what was made there replaces `path`.

    This may be a file or a folder. It is on the disk before it gets its name, so a
    crash leaves the old one or the new one. After an error the old one is left.

    Raises:
        OSError: if it cannot be written.
    """
    prefix = f"{PARTIAL}{path.name[:100]}-"
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=prefix) as folder:
        partial = Path(folder) / path.name  # some writers look at the name
        yield partial
        for written in (partial, *partial.rglob("*")):
            _flush(written)
        if path.is_dir():
            os.replace(path, Path(folder) / BEFORE)
        os.replace(partial, path)
        _flush(path.parent)


def absolute(path: str | Path) -> Path:
    """Return a path from a user without ~, . and .., so that it has a name.

    A link keeps its name, but links before a ".." are followed, as the system does.

    Raises:
        UserError: for a ~ where no home folder is known.
    """
    try:
        path = Path(path).expanduser()
    except RuntimeError as error:
        raise checks.UserError(
            f"{path} begins with ~, but the home folder is not known ({error}); write "
            "the path out."
        ) from error
    if path.name == "..":
        return path.resolve()
    parent = path.parent.resolve() if ".." in path.parts else path.parent.absolute()
    return parent / path.name


def is_litter(path: Path) -> bool:
    """Whether a file is one that Windows or macOS leaves in any folder."""
    return path.name.lower() in LITTER or path.name.startswith("._")


def make_folder(path: Path) -> None:
    """Make a folder and those above it, and write to it.

    Raises:
        UserError: if something is in the way, or it cannot be written to.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise checks.UserError(
            f"the output folder {path} cannot be made: {error.strerror}; choose "
            "another."
        ) from error
    with writable(path), tempfile.TemporaryFile(dir=path) as file:
        file.write(b"0")
        file.flush()  # a full disk may let files begin


def require_no_link(path: Path) -> None:
    """Raise `UserError` for a link that others may have laid to somewhere else."""
    checks.require(
        not path.is_symlink(),
        f"{path} is a link, and is not written through; remove it, or link the folder "
        "that it lies in.",
    )


def remove(folder: Path) -> None:
    """Remove a folder as a whole; a `UserError` if it cannot be."""
    with (
        writable(folder),
        tempfile.TemporaryDirectory(dir=folder.parent, prefix=PARTIAL) as parent,
    ):
        os.replace(folder, Path(parent) / folder.name)


def remove_partial(folder: Path, *, of: str | None = None) -> None:
    """Remove what killed processes left half-written in a folder.

    What was whole, but for its name, gets it. Nobody may be writing it: the caller
    holds a lock.

    Args:
        folder: where they wrote.
        of: what they wrote there; None for anything.
    """
    pattern = "*" if of is None else f"{glob.escape(of[:100])}-????????"
    for left in folder.glob(f"{PARTIAL}{pattern}"):
        if left.is_dir():
            _finish(left)
            shutil.rmtree(left, ignore_errors=True)  # its process may be about to end
        else:
            left.unlink()


def _finish(left):
    """Give a whole folder its name, if its process was killed just before."""
    if (left / BEFORE).exists():
        for whole in left.glob("[!.]*"):
            if not (left.parent / whole.name).exists():
                os.replace(whole, left.parent / whole.name)


@contextlib.contextmanager
def writable(path: Path) -> Iterator[None]:
    """Turn an `OSError` of writing into a `UserError` that says what helps."""
    try:
        yield
    except OSError as error:
        raise checks.UserError(
            f"{path} cannot be written: {error.strerror or error}; make room or mend "
            "the permissions and give the same command again, or choose another folder."
        ) from error


def write_text(path: Path, text: str) -> None:
    """Replace a text file as a whole; a `UserError` if it cannot be written."""
    with writable(path), replacing(path) as partial:
        partial.write_text(text, encoding="utf-8")


def write_json(path: Path, content: object) -> None:
    """Replace a JSON file as a whole; a `UserError` if it cannot be written."""
    write_text(path, json.dumps(content, indent=1) + "\n")


def read_json(path: Path) -> Any:
    """Read a JSON file.

    Raises:
        OSError: if it cannot be read.
        ValueError: if it is not JSON in UTF-8, or nested too deep.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8-sig"))
    except RecursionError as error:
        raise ValueError("it is nested too deep") from error


@contextlib.contextmanager
def locked(file: Path, *, what: str, remedy: str) -> Iterator[None]:
    """Hold a lock file against other processes until the end, or until killed.

    On a file system without locks this only warns.

    Args:
        file: made if missing; it names who holds it.
        what: is locked, for the message: "the workdir runs/a".
        remedy: what else the user can do: "choose another --workdir".

    Raises:
        UserError: if another process holds it, or it cannot be written.
    """
    lock = filelock.FileLock(file, blocking=False, fallback_to_soft=False)
    with writable(file):
        try:
            lock.acquire()
            file.write_text(f"process {os.getpid()} on {platform.node()}\n")
        except filelock.Timeout:
            holder = file.read_text(errors="replace").strip() or "unknown"
            raise checks.UserError(
                f"{what} is in use by a live run ({holder}); wait for it or end it, "
                f"or {remedy}."
            ) from None
        except OSError as error:
            if error.errno not in NO_LOCKS:
                raise
            logging.warning("%s cannot be locked; start one run at a time.", what)
    try:
        yield
    finally:
        lock.release()


@contextlib.contextmanager
def claimed(file: Path, *, wait: bool = False) -> Iterator[Claim]:
    """Hold a lock file that is there only as long as it is held.

    One that was there although nobody held it is of a process that was killed.
    On a file system without locks nobody else is seen.

    Args:
        file: made, and removed at the end.
        wait: until nobody else holds it.

    Raises:
        OSError: if it cannot be written.
    """
    lock = filelock.FileLock(file, blocking=wait, fallback_to_soft=False)
    try:
        lock.acquire()
    except filelock.Timeout:
        yield Claim.BUSY
        return
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise
        yield Claim.FREE
        return
    try:
        left = file.stat().st_size > 0
        file.write_text(f"process {os.getpid()} on {platform.node()}\n")
        yield Claim.LEFT if left else Claim.FREE
    finally:
        file.unlink(missing_ok=True)
        lock.release()


def _flush(path):
    """Have the system write a file or the names in a folder to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in NO_FLUSH or not path.is_dir():
            raise
    finally:
        os.close(descriptor)
