"""Signals as a process hears them; what several do is in test_several_processes."""

import signal
import subprocess
import sys
import time

import pytest

LISTENS = """
import time
from swinsmt_jax.runtime import signals
with signals.listening() as listener:
    print("listening", flush=True)
    {does}
    print("heard", listener.heard(1).name, flush=True)
"""


@pytest.fixture
def start():
    """Start a process that listens for signals, and does something meanwhile."""
    started = []

    def start(does):
        command = [sys.executable, "-c", LISTENS.format(does=does)]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        process = subprocess.Popen(command, **pipes)
        started.append(process)
        assert process.stdout.readline() == "listening\n"
        return process

    yield start
    for process in started:
        process.kill()
        process.communicate()


WAITS = "while listener.heard(1) is None: time.sleep(0.01)"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1])
def test_the_first_signal_is_told_and_ends_nothing(start, number):
    process = start(WAITS)
    process.send_signal(number)
    out, err = process.communicate(timeout=20)
    assert (process.returncode, out, err) == (0, f"heard {number.name}\n", "")


@pytest.mark.parametrize("number, status", [(signal.SIGINT, 130), (signal.SIGTERM, 75)])
def test_a_second_signal_ends_a_process_that_is_outside_of_python(
    start, number, status
):
    process = start("import hashlib; hashlib.pbkdf2_hmac('md5', b'', b'', 10**9)")
    for _ in range(2):
        process.send_signal(number)
        time.sleep(0.2)
    _, err = process.communicate(timeout=20)
    assert process.returncode == status
    assert err == f"second {number.name}: ended at once, without saving.\n"


def test_signals_of_two_kinds_are_one_wish_to_end(start):
    process = start(WAITS)
    process.send_signal(signal.SIGTERM)
    process.send_signal(signal.SIGINT)
    out, _ = process.communicate(timeout=20)
    assert process.returncode == 0 and out.startswith("heard SIG")
