"""The folder of one checkpoint: read it, and tell damage from failing storage."""

import errno
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TypeVar

import jax
import numpy as np
import orbax.checkpoint as ocp
from absl import logging

from swinsmt_jax import checks
from swinsmt_jax.runtime.files import writable
from swinsmt_jax.sharding import path_name

T = TypeVar("T")

DAMAGED = "damaged"  # folder of a workdir
STATE, META, METRICS = "state", "meta", "metrics"  # folders of a checkpoint
METRIC, CASES = "val_dice", "cases"
AHEAD = "crops_ahead"  # of steps times batch size, in the data's stream
SCORES = ocp.JsonCheckpointHandler(filename=METRICS)  # reads and writes METRICS
MAX_LISTED = 6  # differing parameters in a message
LOST = (errno.ENOENT, errno.ENOTDIR, errno.EISDIR)  # files that will not come back


class DamagedError(checks.UserError):
    """A checkpoint that cannot be read, though it was once complete."""


def steps_of(root: Path) -> list[int]:
    """Return the steps of the complete checkpoints in a folder, sorted."""
    found = ocp.path.step.standard_name_format().find_all(root) if root.is_dir() else ()
    return sorted(metadata.step for metadata in found)


def ranked(root: Path) -> list[int]:
    """Return the steps that have a validation Dice, the best and latest first.

    Only scores on the same cases compare: those of the step that was scored last.
    """
    sets = ranked_by_cases(root)
    return max(sets.values(), key=max, default=[])


def ranked_by_cases(root: Path) -> dict[str, list[int]]:
    """Return {fingerprint of validation cases: steps}, the best and latest first."""
    found: dict[str, list[tuple[float, int]]] = {}
    for step in steps_of(root):
        try:
            dice, cases = score_of(root / str(step))
            if dice is not None:
                found.setdefault(cases, []).append((dice, step))
        except DamagedError as error:
            logging.error("%s; it is not considered as the best", error)
    return {
        cases: [step for _, step in sorted(own, reverse=True)]
        for cases, own in found.items()
    }


def dice_of(folder: Path) -> float | None:
    """Return the validation Dice; None if there is none, or it is not a number."""
    return score_of(folder)[0]


def score_of(folder: Path) -> tuple[float | None, str]:
    """Return `dice_of`, and the fingerprint of the cases; "" of earlier versions."""

    def restore():
        found = SCORES.restore(folder / METRICS)
        value = found[METRIC]
        return value if value is None else float(value), found.get(CASES, "")

    return read(folder, restore) if (folder / METRICS).exists() else (None, "")


def meta_of(folder: Path) -> dict:
    """Return the origin of the checkpoint, as `checkpoint.origin_of`."""

    def restore():
        meta = ocp.JsonCheckpointHandler().restore(folder / META)
        if not isinstance(meta, dict) or not isinstance(meta.get("config"), dict):
            raise ValueError(f"{META} holds no config")
        return meta

    return read(folder, restore)


def crops_until(folder: Path) -> int:
    """Return how many crops of the data's stream the steps up to this one took."""
    meta = meta_of(folder)
    return int(folder.name) * meta["batch_size"] + meta.get(AHEAD, 0)


def require_same_parameters(folder: Path, params: Mapping, *, part: str) -> None:
    """Raise `UserError` unless part of the state has these shapes and dtypes."""
    # By the handler: a checkpointer looks for metadata of a step, and warns of none.
    handler = ocp.PyTreeCheckpointHandler()
    tree = read(folder, lambda: handler.metadata(folder / STATE).tree.get(part, {}))
    saved, wanted = _shapes(tree), _shapes(params)
    differing = [
        f"{name}: {saved.get(name, 'absent')} in the checkpoint, "
        f"{wanted.get(name, 'absent')} in the network"
        for name in sorted(saved.keys() | wanted.keys())
        if saved.get(name) != wanted.get(name)
    ]
    more = len(differing) - MAX_LISTED
    checks.require(
        not differing,
        f"the checkpoint {folder} is of another model; {len(differing)} parameters "
        f"differ: {'; '.join(differing[:MAX_LISTED])}"
        f"{f'; and {more} more' if more > 0 else ''}. Use the config it was trained "
        "with.",
    )


def _shapes(tree):
    leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
    dtypes = [
        "" if leaf.dtype == np.float32 else f" {leaf.dtype}" for _, leaf in leaves
    ]
    return {
        path_name(path): f"{tuple(leaf.shape)}{dtype}"
        for (path, leaf), dtype in zip(leaves, dtypes, strict=True)
    }


def put_aside(folder: Path, damage: object) -> None:
    """Move a damaged checkpoint to the workdir's folder "damaged", and log it."""
    target = folder.parent.parent / DAMAGED / folder.name
    while target.exists():
        target = target.with_name(target.name + "_")
    with writable(target):
        target.parent.mkdir(exist_ok=True)
        folder.rename(target)
    logging.error(
        "%s; it was moved to %s, and the run continues without it", damage, target
    )


def read(folder: Path, function: Callable[[], T]) -> T:
    """Return the result of a function that reads a checkpoint.

    Storage libraries raise almost anything on damaged files, and the same if the system
    refuses to read. So after an error all files are read raw. A file that the system
    refuses is not damaged. If it refuses none, it may have recovered, and the function
    is called again.

    Raises:
        DamagedError: for damaged or missing files.
        UserError: for files that cannot be read now (input/output errors, permissions).
    """
    again = True
    while True:
        try:
            return function()
        except (checks.UserError, MemoryError, jax.errors.JaxRuntimeError):
            raise
        except Exception as error:
            _require_readable(folder)
            if not again:
                raise DamagedError(
                    f"the checkpoint {folder} cannot be read; it is damaged or "
                    f"incomplete ({checks.one_line(error)})"
                ) from error
            again = False


def _require_readable(folder):
    """Raise `UserError` if the system refuses to read an existing file."""

    def refuse(error):
        raise error

    try:
        for parent, _, names in os.walk(folder, onerror=refuse):
            for name in names:
                with (
                    open(Path(parent, name), "rb") as file,
                    open(os.devnull, "wb") as to,
                ):
                    shutil.copyfileobj(file, to, 1 << 24)
    except OSError as error:
        if error.errno not in LOST:
            raise checks.UserError(
                f"the checkpoint {folder} cannot be read now ({error}); it may be "
                "whole, and nothing was changed. Mend the file system or its "
                "permissions, and give the same command again."
            ) from error
