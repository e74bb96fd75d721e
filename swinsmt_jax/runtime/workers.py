"""Worker processes behind `concurrent.futures.Executor`."""

import concurrent.futures
import functools
import os
import pickle
import re
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import BrokenExecutor, Executor, Future
from typing import Any, Generic, TypeVar

import loky

from swinsmt_jax import checks

T = TypeVar("T")


class WorkerDiedError(checks.UserError):
    """A process died while it worked on a case."""


class Once(Generic[T]):
    """What a function makes, once in each process that asks for it.

    Pickled is the function: what it makes, such as a network, does not travel. A
    process keeps the last one.

    Args:
        make: the function; it can be pickled.
        made: what it has made in this process.
    """

    def __init__(self, make: Callable[[], T], made: T):
        self._recipe: Any = make
        self._made: T | None = made

    def __getstate__(self) -> bytes:
        known = isinstance(self._recipe, bytes)  # it came from another process
        return self._recipe if known else pickle.dumps(self._recipe)

    def __setstate__(self, recipe: bytes) -> None:
        self._recipe, self._made = recipe, None

    def __call__(self) -> T:
        """Return it."""
        return _made(self._recipe) if self._made is None else self._made


@functools.lru_cache(maxsize=1)
def _made(recipe: bytes) -> Any:
    return pickle.loads(recipe)()


class _Processes(loky.ProcessPoolExecutor):
    def __exit__(self, kind, *_):
        """Wait for submitted work, but end it at once if interrupted."""
        unwanted = kind is not None and not issubclass(kind, Exception)
        self.shutdown(wait=True, kill_workers=unwanted)


def processes(workers: int) -> Executor:
    """Return an executor of processes that end with this one, even if it is killed."""
    return _Processes(workers, initializer=end_with, initargs=(os.getpid(),))


def run_each(
    job: Callable,
    cases: Sequence,
    *,
    workers: int,
    executor: Callable[[int], Executor] = processes,
) -> Iterator[tuple[Any, Future]]:
    """Yield each case with the finished future of `job(case)`, as they end.

    One worker is this process itself. Of several, where a process dies, the cases that
    were being worked on have another turn, each alone; the future of one whose process
    dies again raises `WorkerDiedError`, and the others continue.

    Args:
        job: what to do with a case; it and what it returns can be pickled.
        cases: in the order in which they are begun.
        workers: cases that are worked on at a time.
        executor: makes the executor of so many workers.
    """
    if workers == 1:
        yield from ((case, _here(job, case)) for case in cases)
        return
    waiting: list = list(reversed(cases))
    suspects: list = []
    while waiting or suspects:
        alone = bool(suspects)
        queue, count = ([suspects.pop()], 1) if alone else (waiting, workers)
        running: dict[Future, object] = {}
        with executor(count) as pool:
            try:
                while queue or running:
                    while queue and len(running) < count:
                        future = pool.submit(job, queue[-1])
                        running[future] = queue.pop()
                    done, _ = concurrent.futures.wait(
                        running, return_when=concurrent.futures.FIRST_COMPLETED
                    )
                    for future in done:
                        failure = future.exception()
                        if isinstance(failure, BrokenExecutor):
                            raise failure
                        yield running.pop(future), future
            except BrokenExecutor as error:
                left = [*running.values(), *(queue if alone else ())]
                if alone:
                    yield left[0], _died(error)
                else:
                    suspects += left


def end_with(parent: int) -> None:
    """Let this process end soon after its parent, which cannot end it when killed.

    At Ctrl-C, which every process of a terminal hears, its parent ends it.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)

    def watch():
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _here(job, case):
    future = Future()
    try:
        future.set_result(job(case))
    except Exception as error:
        future.set_exception(error)
    return future


def _died(error):
    codes = re.search(r"\{(.*)\}", str(error))  # loky: "... are {SIGKILL(-9)}"
    future = Future()
    future.set_exception(
        WorkerDiedError(
            f"its worker process has died ({codes[1] if codes else error}), usually "
            "because memory ran out; repeat the command with fewer --workers."
        )
    )
    return future
