"""Cases in processes of this machine, or on the workers of a Dask scheduler.

The scheduler distributes the cases and gives those of a lost worker to another one. It
also blames tasks that only waited on that worker. So each case has a file, in a folder
that all machines share, that counts the workers that died while they worked on it.
"""

import concurrent.futures
import contextlib
import shutil
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from absl import logging

from swinsmt_jax import checks
from swinsmt_jax.runtime import files
from swinsmt_jax.runtime import workers as local
from swinsmt_jax.runtime.workers import WorkerDiedError

MOST_DEATHS = 2  # workers that a case may end
MOST_BLAMES = 10  # of a case that no worker had begun
PATIENCE = 30.0  # seconds until the log says what it waits for

_one_at_a_time = threading.Lock()  # cases of a process, however many threads it has


@dataclass(frozen=True)
class Attempt:
    """A job that refuses a case during which workers died `MOST_DEATHS` times.

    Attributes:
        job: what to do with a case.
        marks: folder with a file for each case that was begun and not ended.
    """

    job: Callable
    marks: Path

    def __call__(self, number: int, case: Any) -> Any:
        """Return what the job makes of the case of this number."""
        mark = self.marks / str(number)
        with _one_at_a_time:
            if not self.marks.is_dir():
                raise checks.UserError(
                    f"the worker on {socket.gethostname()} does not see "
                    f"{self.marks.parent}; all machines must share this folder."
                )
            begun = mark.read_text().splitlines() if mark.exists() else []
            if len(begun) >= MOST_DEATHS:
                raise WorkerDiedError(
                    f"{len(begun)} workers died while they worked on it "
                    f"({', '.join(begun)}), usually because memory ran out; give them "
                    "more, and repeat the command."
                )
            with mark.open("a") as file:
                file.write(f"{socket.gethostname()}\n")
            try:
                return self.job(case)
            finally:
                mark.unlink(missing_ok=True)


def run_each(
    job: Callable, cases: Sequence, *, workers: int, dask: str, folder: Path
) -> Iterator[tuple[Any, Future]]:
    """Yield each case with the finished future of `job(case)`, as they end.

    The future of a case that ended its worker twice raises `WorkerDiedError`.

    Args:
        job: what to do with a case; it and what it returns can be pickled.
        cases: in the order in which they are begun.
        workers: processes of this machine, as in `workers.run_each`.
        dask: address of a scheduler, such as tcp://host:8786, whose workers do it
            instead; "" for none.
        folder: of the results, which all workers see.

    Raises:
        UserError: for an address where no scheduler is, workers that do not see the
            folder, and a scheduler that is lost.
    """
    if not dask:
        yield from local.run_each(job, cases, workers=workers)
        return
    with _client(dask) as client, _marks(folder) as marks:
        _require_shared(client, marks)
        attempt = Attempt(job, marks)

        def begin(number):
            return client.submit(attempt, number, cases[number], pure=False)

        running = {begin(number): number for number in range(len(cases))}
        blamed = dict.fromkeys(running.values(), 0)
        while running:
            for future in _ended(client, running, dask):
                number, ended = running.pop(future), _settled(future)
                blamed[number] += _lost_worker(ended)
                if not _lost_worker(ended):
                    yield cases[number], ended
                elif blamed[number] < MOST_BLAMES:
                    running[begin(number)] = number
                else:
                    yield cases[number], _died(ended)


def _ended(client, running, address):
    """Wait until some futures are done; warn if there are no workers."""
    import distributed

    while True:
        done, lost = (), False
        try:
            with client.as_current():
                done, _ = distributed.wait([*running], PATIENCE, "FIRST_COMPLETED")
        except TimeoutError:
            pass
        except concurrent.futures.CancelledError:
            lost = True
        checks.require(
            client.status == "running" and not lost,
            f"the scheduler at {address} was lost; finished results stay. Start a "
            "scheduler, and the same command continues.",
        )
        if done:
            return done
        if not client.nthreads():
            logging.warning("waiting for workers to join the scheduler at %s", address)


def _settled(future):
    """Return a finished future of Dask as one of `concurrent.futures`.

    Those of Dask's own executor may stay undone for ever when a worker dies
    (distributed 2026.8).
    """
    settled: Future = Future()
    try:
        settled.set_result(future.result())
    except Exception as error:
        settled.set_exception(error)
    return settled


def _died(future):
    died: Future = Future()
    reason = checks.one_line(future.exception())
    died.set_exception(WorkerDiedError(f"its workers died ({reason})."))
    return died


def _lost_worker(future):
    from distributed.scheduler import KilledWorker

    return isinstance(future.exception(), KilledWorker)


@contextlib.contextmanager
def _client(address):
    """Connect to a scheduler; what is not begun is taken back at the end."""
    try:
        from distributed import Client
        from distributed.comm import get_address_host_port
    except ImportError as error:
        raise checks.UserError(
            f"--dask={address} needs Dask ({error}); install it here and on all "
            'workers: pip install "swinsmt_jax[cluster]".'
        ) from error
    try:
        _require_open(get_address_host_port(address, strict=True))
        client = Client(address, timeout=PATIENCE / 3, set_as_default=False)
    except (OSError, ValueError) as error:
        raise checks.UserError(
            f"--dask={address}: no Dask scheduler answers there "
            f"({checks.one_line(error)}); give the address that `dask scheduler` "
            "prints, such as tcp://host:8786."
        ) from error
    try:
        yield client
    finally:
        with contextlib.suppress(OSError, TimeoutError):
            client.close(timeout=PATIENCE / 3)


def _require_open(place):
    """Wait until a port is open; a `Client` that cannot connect leaves threads."""
    deadline = time.monotonic() + PATIENCE / 3  # it may be starting
    while True:
        try:
            return socket.create_connection(place, timeout=PATIENCE / 3).close()
        except ConnectionRefusedError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.2)


@contextlib.contextmanager
def _marks(folder):
    """Make a fresh folder for the marks of this run, which a stale copy cannot have."""
    files.make_folder(folder)
    marks = folder / f"{files.PARTIAL}dask-{uuid.uuid4().hex[:8]}"
    with files.writable(marks):
        marks.mkdir()
    try:
        yield marks
    finally:
        shutil.rmtree(marks, ignore_errors=True)


def _require_shared(client, marks):
    """Refuse workers that do not see the folder, before they are given any case."""
    seen = client.run(_sees, str(marks), on_error="return")
    blind = [f"{host}: {sees}" for host, sees in seen.items() if sees is not True]
    checks.require(
        not blind,
        f"{len(blind)} of {len(seen)} workers do not see {marks.parent}, such as "
        f"{''.join(blind[:1])}. Give a folder that all machines share, and install the "
        "same version on all.",
    )


def _sees(marks):
    for _ in range(3):  # network drives show new folders late
        if Path(marks).is_dir():
            return True
        time.sleep(1)
    return "no such folder"
