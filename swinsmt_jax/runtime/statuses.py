"""Exit statuses of the commands, and how they end at a signal. Loads no jax.

SLURM and spot machines send SIGTERM, or SIGUSR1 on request, before they take a machine
away; Ctrl-C is SIGINT. A second signal ends the process at once.
"""

import contextlib
import signal
import sys
from collections.abc import Iterator

SOME_FAILED = 1  # of many cases or scans
REFUSED = 2  # what the user can fix
STATUS = {  # 75: EX_TEMPFAIL, "try again"
    signal.SIGTERM: 75,
    signal.SIGUSR1: 75,
    signal.SIGINT: 130,
}


class Interrupted(Exception):  # noqa: N818 - as KeyboardInterrupt
    """A run ended by a signal, after its state was saved.

    Attributes:
        number: of the signal.
        step: after which it stopped.
        stop: number of steps of the run.
        status: exit status of the script.
    """

    def __init__(self, number: int, *, step: int, stop: int):
        self.number, self.step, self.stop = signal.Signals(number), step, stop
        super().__init__(
            f"{self.number.name} received: stopped after step {step} of {stop}, which "
            "is saved; the same command continues."
        )
        self.status = STATUS[self.number]


def default(number: int) -> None:
    """Restore the default action of this signal."""
    usual = signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL
    signal.signal(number, usual)


@contextlib.contextmanager
def ending_at_signals(program: str) -> Iterator[None]:
    """Let a signal end the program in one line, with its status.

    Writers remove their partial files on the way out.
    """

    def end(number, _):
        default(number)
        name = signal.Signals(number).name
        print(
            f"{program}: {name} received: what is finished stays, and the same command "
            "continues.",
            file=sys.stderr,
        )
        sys.exit(STATUS[number])

    before = {number: signal.signal(number, end) for number in STATUS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
