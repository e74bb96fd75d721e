"""Atomic writes of files and folders, and the lock of a folder."""

import contextlib
import enum
import errno
import functools
import glob
import json
import os
import platform
import re
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import filelock
from absl import logging

from swinsmt_jax import checks

PARTIAL = ".partial-"  # begins the names of partial files
BEFORE = ".before"  # a folder that is being replaced
NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP)
LEASE = 60.0  # seconds without renewal after which a holder counts as dead
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


def end_of(path: Path, size: int = 4096) -> bytes:
    """Return the last bytes of a file; a `UserError` if it cannot be read."""
    try:
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - size))
            return file.read()
    except OSError as error:
        raise checks.UserError(
            f"{path} cannot be read: {error.strerror}; fix it or its permissions."
        ) from error


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
    """Remove partial files of killed processes from a folder.

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
            f"{path} cannot be written: {error.strerror or error}; make room or fix "
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

    On a file system without locks, such as Lustre without flock, it is held by a file
    beside it that is valid while its time is renewed; a warning says so.

    Args:
        file: made if missing; it names who holds it.
        what: is locked, for the message: "the workdir runs/a".
        remedy: what else the user can do: "choose another --workdir".

    Raises:
        UserError: if another process holds it, or it cannot be written.
    """
    lock: filelock.BaseFileLock = _lock(file)
    with writable(file):
        try:
            try:
                lock.acquire()
                file.write_text(f"process {os.getpid()} on {platform.node()}\n")
            except OSError as error:
                if error.errno not in NO_LOCKS:
                    raise
                logging.warning(
                    "%s cannot be locked: its file system has no locks; %s holds it, "
                    "for others who look after %g s without a sign of life",
                    *(what, lease_of(file), LEASE),
                )
                lock = _lease(file)
                lock.acquire(timeout=LEASE + LEASE / 2)
        except filelock.Timeout:
            raise checks.UserError(
                f"{what} is in use by a live run ({_holder(file, lock)}); wait for it "
                f"or end it, or {remedy}."
            ) from None
    try:
        yield
    finally:
        lock.release()


@contextlib.contextmanager
def claimed(file: Path, *, wait: bool = False) -> Iterator[Claim]:
    """Hold a lock file that exists only as long as it is held.

    A file that nobody holds was left by a killed process.
    On a file system without locks one is held as in `locked`, but without a warning.

    Args:
        file: made, and removed at the end.
        wait: until nobody else holds it.

    Raises:
        OSError: if it cannot be written.
    """
    lock: filelock.BaseFileLock = _lock(file, wait=wait)
    try:
        try:
            lock.acquire()
        except OSError as error:
            if error.errno not in NO_LOCKS:
                raise
            lock = _watched_lease(file)
            lock.acquire(timeout=-1 if wait else 0)
    except filelock.Timeout:
        yield Claim.BUSY
        return
    try:
        left = file.exists() and file.stat().st_size > 0
        file.write_text(f"process {os.getpid()} on {platform.node()}\n")
        yield Claim.LEFT if left else Claim.FREE
    finally:
        file.unlink(missing_ok=True)
        lock.release()


def lease_of(file: Path) -> Path:
    """Return the file that holds a lock where the file system has none."""
    return file.with_name(f"{file.name}.lease")


def _lock(file, wait=False):
    return filelock.FileLock(file, blocking=wait, fallback_to_soft=False)


def _lease(file):
    def tell(lost):
        logging.error(
            "%s was lost (%s): another run may hold it now", lost.lock_file, lost.reason
        )

    return filelock.SoftFileLease(
        lease_of(file), lease_duration=LEASE, on_compromise=tell
    )


@functools.cache  # it is taken over once one lock has seen it unchanged for long
def _watched_lease(file):
    return _lease(file)


def _holder(file, lock):
    """Say who holds a lock."""
    if isinstance(lock, filelock.SoftFileLease):
        said = lease_of(file).read_text(errors="replace")
        known = dict(re.findall(r"^(pid|host)=(.*)$", said, re.MULTILINE))
        return f"process {known.get('pid')} on {known.get('host')}"
    return file.read_text(errors="replace").strip() or "unknown"


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
