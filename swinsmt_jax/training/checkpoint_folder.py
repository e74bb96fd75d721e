"""The folder of one checkpoint: reading it, and telling damage from bad luck."""

import contextlib
import errno
import json
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from absl import logging

from swinsmt_jax import checks
from swinsmt_jax.runtime import processes
from swinsmt_jax.sharding import path_name

DAMAGED = "damaged"
METRICS, METRIC = "metrics", "val_dice"
SHOWN = 6  # differing parameters in a message
# What the system says of files that are lost; all else it says may pass.
LOST = (errno.ENOENT, errno.ENOTDIR, errno.EISDIR)


class DamagedError(checks.UserError):
    """A checkpoint that cannot be read, though it was once complete."""


def steps_of(root: Path) -> list[int]:
    """Return the steps of the complete checkpoints in a folder, sorted."""
    found = root.iterdir() if root.is_dir() else ()
    return sorted(int(p.name) for p in found if p.name.isdecimal() and p.is_dir())


def meta_of(folder: Path) -> dict:
    """Return what the checkpoint belongs to."""
    with readable(folder):
        meta = json.loads((folder / "meta" / "metadata").read_text())
        if not isinstance(meta, dict) or not isinstance(meta.get("config"), dict):
            raise ValueError("meta/metadata holds no config")
    return meta


def metrics_of(folder: Path) -> dict[str, float | None]:
    """Return the validation Dice by its name; None where it was no number."""
    file = folder / METRICS / METRICS
    if not file.exists():
        return {}
    with readable(folder):
        value = json.loads(file.read_text())[METRIC]
        return {METRIC: value if value is None else float(value)}


def put_aside(folder: Path, damage: object) -> None:
    """Move a damaged checkpoint to the workdir's folder "damaged", and say so.

    Of several processes the first one does so.
    """
    if not processes.is_first():
        return
    target = folder.parent.parent / DAMAGED / folder.name
    while target.exists():
        target = target.with_name(target.name + "_")
    try:
        target.parent.mkdir(exist_ok=True)
        os.replace(folder, target)
    except OSError as error:
        raise checks.UserError(
            f"the damaged checkpoint {folder} cannot be moved to {target}: "
            f"{error.strerror}; mend the permissions, or move it yourself."
        ) from error
    logging.error(
        "%s; it was moved to %s, and the run goes on without it", damage, target
    )


@contextlib.contextmanager
def readable(folder: Path) -> Iterator[None]:
    """Turn what storage libraries raise on damaged files into a `UserError`.

    They raise almost anything. What the system could not do just now is no damage.
    """
    try:
        yield
    except (checks.UserError, MemoryError, jax.errors.JaxRuntimeError):
        raise
    except Exception as error:
        reason = " ".join(str(error).split())[:200]
        if _may_pass(error):
            raise checks.UserError(
                f"the checkpoint {folder} cannot be read now ({reason}); it may be "
                "whole, and nothing was changed. Mend the file system or its "
                "permissions, and give the same command again."
            ) from error
        raise DamagedError(
            f"the checkpoint {folder} cannot be read; it is damaged or incomplete "
            f"({reason})"
        ) from error


def _may_pass(error):
    """Whether the system refused to read (an input/output error, a stale handle)."""
    while error is not None:
        said = re.findall(r"OS error (\d+)", str(error))  # of tensorstore
        number = getattr(error, "errno", None)
        if any(n not in LOST for n in (*map(int, said), *filter(None, [number]))):
            return True
        error = error.__cause__ or error.__context__
    return False


def require_same_parameters(
    folder: Path, params: Mapping, *, part: str = "params"
) -> None:
    """Raise `UserError` unless a checkpoint holds parameters of these shapes."""
    with readable(folder), ocp.PyTreeCheckpointer() as reader:
        saved = reader.metadata(folder / "state").item_metadata.tree[part]
    saved, wanted = _shapes(saved), _shapes(params)
    differing = [
        f"{name}: {saved.get(name, 'absent')} in the checkpoint, "
        f"{wanted.get(name, 'absent')} in the network"
        for name in sorted(saved.keys() | wanted.keys())
        if saved.get(name) != wanted.get(name)
    ]
    more = len(differing) - SHOWN
    checks.require(
        not differing,
        f"the checkpoint {folder} is of another model; {len(differing)} parameters "
        f"differ: {'; '.join(differing[:SHOWN])}"
        f"{f'; and {more} more' if more > 0 else ''}. Use the config it was trained "
        "with.",
    )


def _shapes(tree):
    leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
    return {path_name(path): tuple(leaf.shape) for path, leaf in leaves}


def read_parameters(folder: Path, like: Mapping, *, part: str) -> dict:
    """Read parameters as arrays that are not tied to a device."""
    require_same_parameters(folder, like, part=part)
    wanted = {part: like}
    as_numpy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), wanted)
    with readable(folder), ocp.PyTreeCheckpointer() as reader:
        found = reader.restore(
            folder / "state",
            args=ocp.args.PyTreeRestore(
                item=wanted, restore_args=as_numpy, partial_restore=True
            ),
        )
    return jax.tree.map(jnp.asarray, found[part])
