"""Signals that ask a training to end: finish the step, save, and exit with a status.

Which signals: see `statuses`.
"""

import contextlib
import signal
import threading
from collections.abc import Iterator

import jax
from jax.experimental import multihost_utils

from swinsmt_jax.runtime.statuses import STATUS, default


class Interrupted(Exception):  # noqa: N818 - as KeyboardInterrupt
    """A run ended by a signal, after its state was saved.

    Attributes:
        status: exit status of the script.
    """

    def __init__(self, number: signal.Signals, *, step: int, stop: int):
        super().__init__(
            f"{number.name} received: stopped after step {step} of {stop}, which is "
            "saved; the same command continues."
        )
        self.status = STATUS[number]


class Listener:
    """Remembers the first signal; open with `listening`."""

    def __init__(self) -> None:
        self._found: signal.Signals | None = None

    def hear(self, number: int, _: object) -> None:
        """Note a signal; the next of its kind acts as usual."""
        self._found = signal.Signals(number)
        default(number)

    def heard(self, step: int) -> signal.Signals | None:
        """Return the signal that asks to end after this step, in all processes alike.

        With several processes JAX listens for SIGTERM, and all agree on the step; each
        of them must ask after each step.
        """
        if jax.process_count() == 1:
            return self._found
        reached = multihost_utils.reached_preemption_sync_point(step)
        return signal.SIGTERM if reached else None

    def poll(self, step: int, stop: int) -> None:
        """Raise `Interrupted` if a signal asks to end; `step` of `stop` must be saved.

        With several processes, who hear of it after a step alone, nothing is raised.
        """
        if self._found is not None:
            raise Interrupted(self._found, step=step, stop=stop)


@contextlib.contextmanager
def listening() -> Iterator[Listener]:
    """Listen for the signals of `STATUS`; what was there before comes back afterwards.

    Only the main thread of a single process can: elsewhere nothing is changed.
    """
    listener = Listener()
    main = threading.current_thread() is threading.main_thread()
    if not main or jax.process_count() > 1:
        yield listener
        return
    before = {number: signal.signal(number, listener.hear) for number in STATUS}
    try:
        yield listener
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
