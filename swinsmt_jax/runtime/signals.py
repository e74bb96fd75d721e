"""Signals that stop a training run: finish the step, save, and exit with a status.

`statuses` lists the signals. A signal to any process of a run is passed to all, and all
stop after the same step.
"""

import contextlib
import os
import select
import signal
import socket
import sys
import threading
from collections import Counter
from collections.abc import Iterator

import jax

from swinsmt_jax.runtime import processes
from swinsmt_jax.runtime.statuses import STATUS, Interrupted

LOOK_EVERY = 0.5  # seconds between two looks at what the others have heard
HEARD, REACHED = "swinsmt_jax/heard/", "swinsmt_jax/reached/"

_open: "list[Listener]" = []


class Listener:
    """Remembers the first signal; open with `listening`.

    A thread of its own hears the second one, which ends the process at once, also while
    the main thread compiles or waits for a device. With several processes it tells the
    others, and agrees with theirs on the step after which all stop: the next that none
    of them has passed. Until that is known, `heard` waits.
    """

    def __init__(self) -> None:
        self._found: signal.Signals | None = None
        self._changed = threading.Condition()
        self._reached, self._asked = -1, False
        self._last: int | None = None

    def hear(self, number: int, _: object = None) -> None:
        """Note a signal."""
        self._found = self._found or signal.Signals(number)

    def heard(self, step: int) -> signal.Signals | None:
        """Return the signal that asks to end after this step, in all processes alike.

        Each of several processes must ask after each step.
        """
        if jax.process_count() == 1:
            return self._found
        with self._changed:
            while self._asked and self._last is None:
                self._changed.wait(LOOK_EVERY)
            self._reached = step
            if self._last is None or step < self._last:
                return None
        return self._found

    def poll(self, step: int, stop: int) -> None:
        """Raise `Interrupted` if a signal asks to end; `step` of `stop` must be saved.

        Of several processes some may hear of it before the others.
        """
        if self._found is not None:
            raise Interrupted(self._found, step=step, stop=stop)

    def _watch(self, woken, ended):
        """Count signals as they arrive, and look at those of other processes."""
        client = processes.coordination() if processes.several() else None
        seen: Counter = Counter()
        while not ended.is_set():
            if select.select([woken], [], [], LOOK_EVERY if client else None)[0]:
                seen.update(number for number in woken.recv(100) if number in STATUS)
                for number, times in seen.items():
                    self.hear(number)
                    if times > 1:
                        _end_at_once(number)
            if client is not None and self._last is None:
                with contextlib.suppress(jax.errors.JaxRuntimeError):  # of the end
                    self._agree(client)

    def _agree(self, client):
        """Exchange signals; find the last step once all processes have sent theirs."""
        own, count = jax.process_index(), jax.process_count()
        if self._found is None:
            told = client.key_value_dir_get(HEARD)
            if not told:
                return
            self.hear(min(int(number) for _, number in told))
        with self._changed:
            self._asked = True  # from now on `heard` goes no further
        heard, reached = f"{HEARD}{own}", f"{REACHED}{own}"
        client.key_value_set(heard, str(int(self._found)), allow_overwrite=True)
        client.key_value_set(reached, str(self._reached), allow_overwrite=True)
        steps = client.key_value_dir_get(REACHED)
        if len(steps) == count:
            told = client.key_value_dir_get(HEARD)
            with self._changed:
                self._found = signal.Signals(min(int(number) for _, number in told))
                self._last = max(int(step) for _, step in steps) + 1
                self._changed.notify_all()


def _end_at_once(number):
    name = signal.Signals(number).name
    print(f"second {name}: ended at once, without saving.", file=sys.stderr, flush=True)
    os._exit(STATUS[number])


@contextlib.contextmanager
def listening_if_distributed() -> Iterator[None]:
    """Listen from the start if there are other processes, which all end together."""
    with listening() if processes.several() else contextlib.nullcontext():
        yield


@contextlib.contextmanager
def listening() -> Iterator[Listener]:
    """Listen for the signals of `STATUS`; what was there before comes back afterwards.

    Only the main thread can: elsewhere nothing is changed. Within another `listening`
    it is the same listener.
    """
    if _open:
        yield _open[-1]
        return
    listener = Listener()
    if threading.current_thread() is not threading.main_thread():
        yield listener
        return
    ended = threading.Event()
    woken, wake = socket.socketpair()
    for end in (woken, wake):
        end.setblocking(False)
    before = {number: signal.signal(number, listener.hear) for number in STATUS}
    fd = signal.set_wakeup_fd(wake.fileno(), warn_on_full_buffer=False)
    thread = threading.Thread(target=listener._watch, args=(woken, ended), daemon=True)
    thread.start()
    _open.append(listener)
    try:
        yield listener
    finally:
        _open.clear()
        signal.set_wakeup_fd(fd)
        for number, handler in before.items():
            signal.signal(number, handler)
        ended.set()
        wake.send(b"\0")
        thread.join()
        woken.close()
        wake.close()
