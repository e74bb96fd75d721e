"""Metrics of a run: metrics.jsonl, TensorBoard and the progress bar."""

import collections
import contextlib
import errno
import json
import math
import os
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from absl import logging
from tensorboardX import SummaryWriter
from tqdm import tqdm

from swinsmt_jax.runtime import processes
from swinsmt_jax.runtime.cost import Cost
from swinsmt_jax.runtime.files import write_text

FILE = "metrics.jsonl"
TIMED_STEPS = 20
SHOWN = {
    "loss": "loss",
    "accuracy": "accuracy",
    "learning_rate": "lr",
    "patches_per_second": "patch/s",
}


class Clock:
    """Rates over the last finished steps; the first step is not timed."""

    def __init__(self, batch_size: int, cost: Cost):
        self._batch_size, self._cost = batch_size, cost
        self._ends: collections.deque[tuple[float, float]] = collections.deque(
            maxlen=TIMED_STEPS + 1
        )
        self._waited = 0.0

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """Count time in this context as waiting for data."""
        start = time.perf_counter()
        yield
        self._waited += time.perf_counter() - start

    def tick(self) -> dict[str, float]:
        """Note the end of a step.

        Returns:
            Once known, `patches_per_second`, `input_wait` (the share of time that the
            step waited for data) and the rates of `Cost.rates`.
        """
        self._ends.append((time.perf_counter(), self._waited))
        steps = len(self._ends) - 1
        if not steps:
            return {}
        (start, waited_before), (end, waited) = self._ends[0], self._ends[-1]
        return {
            "patches_per_second": steps * self._batch_size / (end - start),
            "input_wait": (waited - waited_before) / (end - start),
            **self._cost.rates(steps / (end - start)),
        }

    def restart(self) -> None:
        """Leave out the time since the last step."""
        self._ends.clear()
        self._ends.append((time.perf_counter(), self._waited))


class Log:
    """Writes rows of metrics and moves the progress bar; open with `open_log`."""

    def __init__(self, file: Any, board: SummaryWriter, bar: tqdm):
        self._file, self._board, self._bar = file, board, bar  # file: unbuffered

    def progress(self, values: Mapping[str, float]) -> None:
        """Move the bar by one step and show its metrics."""
        shown = {label: f"{values[n]:.3g}" for n, label in SHOWN.items() if n in values}
        self._bar.set_postfix(shown, refresh=False)
        self._bar.update()

    def row(self, step: int, values: Mapping[str, float]) -> None:
        """Write metrics of a step; later calls for the same step add to them.

        Raises:
            OSError: if metrics.jsonl cannot be written, as on a full disk.
        """
        finite = {k: v if math.isfinite(v) else None for k, v in values.items()}
        line = (json.dumps({"step": step, **finite}) + "\n").encode()
        if self._file.write(line) < len(line):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        for name, value in values.items():
            if math.isfinite(value):
                self._board.add_scalar(name, value, step)

    def pictures(self, step: int, pictures: Mapping[str, np.ndarray]) -> None:
        """Show pictures, uint8 [H, W, 3], in TensorBoard."""
        for name, picture in pictures.items():
            self._board.add_image(name, picture, step, dataformats="HWC")

    def say(self, message: str, *values: object, level: int = logging.INFO) -> None:
        """Log a line above the bar."""
        if processes.is_first():
            with tqdm.external_write_mode():
                logging.log(level, message, *values)


@contextlib.contextmanager
def open_log(workdir: Path, *, start: int, stop: int) -> Iterator[Log]:
    """Continue the log of a run after step `start`; drop later rows.

    Only the first process logs anything.
    """
    first, path = processes.is_first(), Path(os.devnull)
    if first:
        path = workdir / FILE
        rows = [row for row in read_rows(path) if row["step"] <= start]
        write_text(path, "".join(json.dumps(row) + "\n" for row in rows))
    bar = {"desc": "training", "unit": "step", "dynamic_ncols": True}
    with (
        path.open("ab", buffering=0) as file,
        _open_board(workdir / "tensorboard", start + 1, write_to_disk=first) as board,
        tqdm(total=stop, initial=start, disable=not first, **bar) as bar,
    ):
        yield Log(file, board, bar)


@contextlib.contextmanager
def _open_board(folder, step, *, write_to_disk):
    """Open TensorBoard's files, which lose rows on a full disk.

    Its thread then dies, so its queue must not fill.
    """
    board = SummaryWriter(
        str(folder), purge_step=step, max_queue=0, write_to_disk=write_to_disk
    )
    try:
        yield board
    finally:
        with contextlib.suppress(OSError):
            board.close()


def read_rows(path: Path) -> list[dict]:
    """Read a metrics.jsonl: one row per step, merged from its lines.

    A line that a killed run left unfinished is skipped.
    """
    rows: dict[int, dict] = {}
    text = path.read_text(errors="replace") if path.exists() else ""
    for line in text.splitlines():
        with contextlib.suppress(ValueError, RecursionError, TypeError):
            row = json.loads(line)
            if isinstance(row, dict) and "step" in row:
                rows.setdefault(row["step"], {}).update(row)
    return list(rows.values())
