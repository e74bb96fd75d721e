"""Traces of a few training steps, by jax.profiler."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
from absl import logging

from swinsmt_jax.runtime import processes

FOLDER = "profile"
LEFT_OUT = 3  # steps before the trace: the first ones wait for data and warm up


class Profile:
    """Writes a trace of some steps to <workdir>/profile; open it around the steps.

    Args:
        workdir: of the run.
        steps: number of steps traced; 0 writes nothing.
        first: the first step of this start.
        stop: the last one.
    """

    def __init__(self, workdir: Path, *, steps: int, first: int, stop: int):
        self._folder, self._tracing = workdir / FOLDER, False
        self._first = first + LEFT_OUT
        self._last = self._first + steps - 1
        left = max(0, stop - self._first + 1)
        if steps > left and processes.is_first():
            logging.warning(
                "--profile=%d asks for more steps than the %d that are left after the "
                "first %d; a larger training.num_steps has more",
                *(steps, left, LEFT_OUT),
            )

    def __enter__(self) -> "Profile":
        return self

    def __exit__(self, *_) -> None:
        if self._tracing:
            self._stop()

    @contextlib.contextmanager
    def step(self, number: int) -> Iterator[None]:
        """Trace what happens within, if this step is one of those traced."""
        if self._first <= number <= self._last and not self._tracing:
            jax.profiler.start_trace(self._folder, profiler_options=_options())
            self._tracing = True
        with jax.profiler.StepTraceAnnotation("train", step_num=number):
            yield

    def ended(self, number: int, result: Any) -> None:
        """Stop after the last step traced, once its result is there."""
        if self._tracing and number == self._last:
            jax.block_until_ready(result)
            self._stop()

    def _stop(self):
        jax.profiler.stop_trace()
        self._tracing = False
        logging.info(
            "trace written to %s; docs/training.md says how to read it", self._folder
        )


def _options():
    """Leave out the calls of Python, which fill the trace and slow the host."""
    options = jax.profiler.ProfileOptions()
    options.python_tracer_level = 0
    return options
