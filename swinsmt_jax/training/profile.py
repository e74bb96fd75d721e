"""Traces of a few training steps, by jax.profiler."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

import jax
from absl import logging

FOLDER = "profile"
LEFT_OUT = 3  # steps before the trace: the first ones wait for data and warm up


class Profile:
    """Writes a trace of some steps to <workdir>/profile; open it around the steps.

    Args:
        workdir: of the run.
        steps: number of steps traced; 0 writes nothing.
        first: the first step of this start.
    """

    def __init__(self, workdir: Path, *, steps: int, first: int):
        self._folder, self._tracing = workdir / FOLDER, False
        self._first = first + LEFT_OUT
        self._last = self._first + steps - 1

    def __enter__(self) -> "Profile":
        return self

    def __exit__(self, *_) -> None:
        if self._tracing:
            self._stop()

    @contextlib.contextmanager
    def step(self, number: int) -> Iterator[None]:
        """Trace what happens within, if this step is one of those traced."""
        if self._first <= number <= self._last and not self._tracing:
            jax.profiler.start_trace(self._folder)
            self._tracing = True
        with jax.profiler.StepTraceAnnotation("train", step_num=number):
            yield

    def ended(self, number: int, result) -> None:
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
