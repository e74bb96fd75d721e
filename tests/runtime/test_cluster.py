"""Work on a Dask scheduler on loopback: lost workers, bad addresses, blind workers."""

import os
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from swinsmt_jax.checks import UserError
from swinsmt_jax.runtime import cluster, workers

ROOT = Path(__file__).parents[2]


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def is_open(port):
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


class Scheduler:
    """A scheduler in a process of its own, and its workers."""

    def __init__(self):
        port = free_port()
        self.address = f"tcp://127.0.0.1:{port}"
        self.scheduler = self._start(
            "scheduler", "--host=127.0.0.1", f"--port={port}", "--no-dashboard"
        )
        self.workers = []
        while not is_open(port):
            assert self.scheduler.poll() is None
            time.sleep(0.1)

    def _start(self, *arguments):
        return subprocess.Popen(
            [Path(sys.executable).with_name("dask"), *arguments],
            **{"cwd": ROOT, "env": os.environ | {"PYTHONPATH": str(ROOT)}},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )

    def add(self, count):
        """Start workers; without a nanny, one that dies stays dead."""
        flags = "--nthreads=1 --no-nanny --no-dashboard --memory-limit=0".split()
        for _ in range(count):
            self.workers.append(self._start("worker", self.address, *flags))

    def close(self):
        for process in (*self.workers, self.scheduler):
            process.kill()
            process.wait()


@pytest.fixture(scope="module")
def scheduler():
    found = Scheduler()
    found.add(4)
    yield found
    found.close()


def run(job, cases, scheduler, folder):
    pool = {"workers": 1, "dask": scheduler.address, "folder": folder}
    return dict(cluster.run_each(job, cases, **pool))


def test_a_case_that_ends_its_worker_twice_is_named_alone(scheduler, tmp_path):
    """The cases are expressions; two of the four workers are left afterwards."""
    die, once = "__import__('os')._exit(1)", tmp_path / "once"
    first = f"__import__('pathlib').Path({str(once)!r}).touch(exist_ok=False)"
    found = run(eval, ["1", die, "2", "1 / 0", first, "3"], scheduler, tmp_path / "o")
    with pytest.raises(workers.WorkerDiedError, match="2 workers died while they work"):
        found.pop(die).result()
    with pytest.raises(ZeroDivisionError):
        found.pop("1 / 0").result()
    assert [found[case].result() for case in "123"] == [1, 2, 3]
    assert once.exists() and not list((tmp_path / "o").iterdir())


def test_what_is_made_once_does_not_travel(scheduler, tmp_path):
    made = workers.Once(os.getpid, -1)
    assert made() == -1
    found = run(made_by, [(made, i) for i in range(4)], scheduler, tmp_path)
    theirs = {future.result() for future in found.values()}
    assert theirs and not theirs & {-1, os.getpid()}


def made_by(case):
    return case[0]()


def test_a_bad_address_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr(cluster, "PATIENCE", 3.0)
    for address in (f"tcp://127.0.0.1:{free_port()}", "nonsense://x", "127.0.0.1"):
        pool = {"workers": 1, "dask": address, "folder": tmp_path}
        with pytest.raises(UserError, match="no Dask scheduler answers there") as told:
            list(cluster.run_each(abs, [1], **pool))
        assert f"--dask={address}" in str(told.value) and "\n" not in str(told.value)


def test_workers_that_do_not_see_the_folder_get_no_case(
    scheduler, tmp_path, monkeypatch
):
    monkeypatch.setattr(cluster, "_sees", is_file)  # of another machine's disk
    with pytest.raises(UserError, match="of . workers do not see .*all machines share"):
        run(abs, [1], scheduler, tmp_path / "own")


def is_file(path):
    return Path(path).is_file()


def test_a_worker_that_joins_later_must_see_the_folder(tmp_path):
    attempt = cluster.Attempt(abs, tmp_path / "another disk" / "marks")
    with pytest.raises(UserError, match="does not see .*another disk; all machines"):
        attempt(0, -1)


@pytest.mark.slow
def test_it_waits_for_workers_and_ends_with_the_scheduler(
    tmp_path, monkeypatch, caplog
):
    monkeypatch.setattr(cluster, "PATIENCE", 2.0)
    found = Scheduler()
    try:
        results = cluster.run_each(
            time.sleep, [0, 600], workers=1, dask=found.address, folder=tmp_path
        )
        late = threading.Timer(5, found.add, [1])
        late.start()
        case, future = next(results)
        late.join()
        assert case == 0 and future.result() is None
        assert "waiting for workers to join the scheduler at tcp" in caplog.text
        found.workers[0].kill()
        found.scheduler.kill()
        with pytest.raises(UserError, match="was lost; finished results stay"):
            next(results)
    finally:
        found.close()
