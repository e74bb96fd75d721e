"""Worker processes that die, whose parent dies, and work without processes."""

import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from swinsmt_jax.runtime import workers

DIE = "__import__('os')._exit(1)"


def test_a_process_that_dies_fails_its_case_alone():
    """The cases are expressions, and `eval` works on them."""
    cases = ["None", DIE, "'bad'", "str(1)", "str(2)"]
    found = dict(workers.run_each(eval, cases, workers=2))
    with pytest.raises(workers.WorkerDiedError, match="has died .EXIT.1.*--workers"):
        found.pop(DIE).result()
    found = {case: future.result() for case, future in found.items()}
    assert found == {"None": None, "'bad'": "bad", "str(1)": "1", "str(2)": "2"}


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="needs Linux's /proc")
def test_processes_end_with_a_parent_that_is_killed():
    code = (
        "import time; from swinsmt_jax.runtime import workers\n"
        "list(workers.run_each(time.sleep, [600, 600], workers=2))"
    )
    root = Path(__file__).parents[2]
    parent = subprocess.Popen([sys.executable, "-c", code], cwd=root)
    listed = Path(f"/proc/{parent.pid}/task/{parent.pid}/children")
    wait_for(lambda: len(listed.read_text().split()) >= 4)  # and two resource trackers
    children = listed.read_text().split()
    time.sleep(1)  # until they work
    os.kill(parent.pid, signal.SIGKILL)
    parent.wait()
    try:
        wait_for(lambda: not any(map(runs, children)))
    finally:
        for child in filter(runs, children):
            os.kill(int(child), signal.SIGKILL)


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="needs Linux's /proc")
def test_ctrl_c_ends_all_processes_at_once():
    code = (
        "import time; from swinsmt_jax.runtime import statuses, workers\n"
        "with statuses.ending_at_signals('x.py'):\n"
        "    list(workers.run_each(time.sleep, [600, 600], workers=2))"
    )
    parent = subprocess.Popen(
        [sys.executable, "-c", code],
        **{"cwd": Path(__file__).parents[2], "start_new_session": True},
        stderr=subprocess.PIPE,
        text=True,
    )
    listed = Path(f"/proc/{parent.pid}/task/{parent.pid}/children")
    wait_for(lambda: len(listed.read_text().split()) >= 4)
    children = listed.read_text().split()
    time.sleep(1)  # until they work
    os.killpg(parent.pid, signal.SIGINT)  # as a terminal does
    _, said = parent.communicate(timeout=60)
    assert parent.returncode == 130 and said.count("\n") == 1, said
    wait_for(lambda: not any(map(runs, children)))


def runs(process):
    try:
        return (
            Path(f"/proc/{process}/stat").read_text().split(")")[-1].split()[0] != "Z"
        )
    except OSError:
        return False


def wait_for(condition):
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_one_worker_is_this_process():
    ((_, future),) = workers.run_each(lambda _: os.getpid(), ["case"], workers=1)
    assert future.result() == os.getpid()


@pytest.mark.parametrize("count", [1, 2])
def test_what_a_job_raises_comes_with_its_case(count):
    found = dict(workers.run_each(eval, ["1", "1 / 0"], workers=count))
    assert found["1"].result() == 1
    with pytest.raises(ZeroDivisionError):
        found["1 / 0"].result()


def test_another_executor_can_do_the_work():
    found = workers.run_each(abs, [-3, 4], workers=2, executor=ThreadPoolExecutor)
    assert {case: future.result() for case, future in found} == {-3: 3, 4: 4}
