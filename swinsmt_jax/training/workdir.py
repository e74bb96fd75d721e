"""The folder of a run; it belongs to one experiment and contains its config.json.

<workdir>/config.json         the resolved config of the last start
<workdir>/checkpoints/<step>  state, config and seed, data and batch of the run
<workdir>/metrics.jsonl       one row of metrics per logged step
<workdir>/tensorboard/        the same for TensorBoard, and pictures
<workdir>/run.json            each start: command, revision, versions, data, machine
<workdir>/profile/            traces of `--profile`
<workdir>/damaged/            checkpoints that could not be read
<workdir>/lock                held while a run is alive
<workdir>/requeue             written when a signal stops the run after saving
"""

import contextlib
import secrets
import signal
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import jax

from swinsmt_jax import checks
from swinsmt_jax.config import ExperimentConfig, from_config_dict, to_dict
from swinsmt_jax.runtime import files, processes
from swinsmt_jax.runtime.statuses import STATUS, Interrupted
from swinsmt_jax.training.checkpoint_folder import steps_of

CONFIG = "config.json"
CHECKPOINTS = "checkpoints"
LOCK = "lock"
REQUEUE = "requeue"
FOLDERS = (CHECKPOINTS, "tensorboard", "profile", "damaged")

# Keys, or the beginnings of some, that decide what is learnt or how it is validated,
# and that a run may change when it is continued: the log and run.json tell.
TOLD = (
    "data.augmentations.",
    "data.batch_size",
    "data.foreground_ratio",
    "optimizer.learning_rate",
    "optimizer.weight_decay",
    "optimizer.final_ratio",
    "optimizer.clip_norm",
    "optimizer.extend",
    "training.num_steps",
    "training.eval_cases",
    "inference.overlap",
    "inference.blend",
)
# All keys that may change; data.root may move, since the checkpoint knows the data's
# fingerprint.
MAY_CHANGE = (
    *TOLD,
    "optimizer.spans",
    "training.log_every",
    "training.eval_every",
    "training.checkpoint_every",
    "training.accumulate",
    "training.max_skipped",
    "training.deterministic",
    "mesh.data",
    "mesh.expert",
    "model.remat",
    "data.root",
    "data.num_workers",
    "data.num_threads",
    "data.cache",
    "data.description",
    "inference.window_batch",
    "inference.accumulate_on",
)
# Keys in which the processes of one run may differ: the data may lie on each node.
MAY_DIFFER = ("data.root", "data.num_workers", "data.num_threads", "data.cache")


def open_workdir(path: str | Path, config: ExperimentConfig) -> Path:
    """Make the folder, or check that it belongs to this config; record the config.

    It belongs to a config once it contains a checkpoint. The first process does this,
    and the others find it done.

    Raises:
        UserError: for a path that cannot be a folder, an unreadable config.json, a
            config that differs from the recorded one in keys outside `MAY_CHANGE` or
            from another process's in keys outside `MAY_DIFFER`, a folder that the
            processes do not share, and a link in place of a folder.
    """
    workdir = files.absolute(path)
    keys = _flat(to_dict(config)).items()
    processes.require_same({k: v for k, v in keys if k not in MAY_DIFFER})
    processes.on_first(lambda: _claim(workdir, config))
    _require_shared(workdir)
    return workdir


def _require_shared(workdir):
    """Check that all processes see what the first one has just written."""
    if jax.process_count() == 1:
        return
    token = workdir / f".shared-{processes.gather(secrets.token_hex(8))[0]}"
    processes.on_first(lambda: files.write_text(token, ""))
    processes.run_on_all(
        lambda: checks.require(
            token.exists(),
            f"the workdir {workdir} is not the same folder for all processes; give a "
            "--workdir on a file system that all hosts share.",
        )
    )
    processes.on_first(lambda: token.unlink(missing_ok=True))


@contextlib.contextmanager
def requeued(workdir: Path) -> Iterator[None]:
    """Leave the file `REQUEUE` if a signal announced the end of the time limit.

    A batch script can check for the file. The next start removes it.
    """
    mark = workdir / REQUEUE
    processes.on_first(lambda: mark.unlink(missing_ok=True))
    try:
        yield
    except Interrupted as error:
        if error.status == STATUS[signal.SIGTERM] and processes.is_first():
            files.write_text(mark, f"{error}\n")
        processes.barrier()  # the launcher may end all with the first one
        raise


@contextlib.contextmanager
def locked(path: str | Path) -> Iterator[None]:
    """Make the folder and lock it against a second run until the end, or until killed.

    The first process does this.

    Raises:
        UserError: for a path that cannot be a writable folder, and one that a live run
            holds.
    """
    workdir = files.absolute(path)
    what, remedy = f"the workdir {workdir}", "choose another --workdir"

    def hold():
        with files.writable(workdir):
            workdir.mkdir(parents=True, exist_ok=True)
        held.enter_context(files.locked(workdir / LOCK, what=what, remedy=remedy))

    with contextlib.ExitStack() as held:
        processes.on_first(hold)
        yield


def _claim(workdir, config):
    with files.writable(workdir):
        workdir.mkdir(parents=True, exist_ok=True)
        files.remove_partial(workdir)
    for name in FOLDERS:
        files.require_no_link(workdir / name)
    file = workdir / CONFIG
    if file.exists():
        recorded = recorded_config(file)
        if steps_of(workdir / CHECKPOINTS):
            _require_same(workdir, recorded, config)
    files.write_json(file, to_dict(config))


def recorded_config(file: Path) -> ExperimentConfig:
    """Read a config.json back; raise `UserError` if it is not one."""
    try:
        return from_config_dict(files.read_json(file))
    except (OSError, ValueError) as error:
        raise checks.UserError(
            f"{file} is not the config of a run ({error}); repair it, or choose "
            "another --workdir."
        ) from error


def _require_same(workdir, old, new):
    changed = [
        f"{key}: {before!r} -> {after!r}"
        for key, (before, after) in differing(old, new).items()
        if not key.startswith(MAY_CHANGE)
    ]
    checks.require(
        not changed,
        f"the workdir {workdir} belongs to another config; these keys differ: "
        f"{'; '.join(changed)}. Choose another --workdir or restore the keys. A run "
        f"may change only {', '.join(key.rstrip('.') for key in MAY_CHANGE)}.",
    )


def differing(
    old: ExperimentConfig, new: ExperimentConfig
) -> dict[str, tuple[object, object]]:
    """Return {dotted key: (before, after)} of what differs between two configs.

    Values that an earlier version did not take from its data do not count.
    """
    if not old.data.seen.fingerprint:
        spacing = old.data.spacing or new.data.spacing
        classes = old.data.classes or new.data.classes
        old = replace(old, data=replace(old.data, spacing=spacing, classes=classes))
    same = replace(old.data, seen=new.data.seen)  # checkpoints know the fingerprint
    before, after = _flat(to_dict(replace(old, data=same))), _flat(to_dict(new))
    return {
        key: (before.get(key, "absent"), after.get(key, "absent"))
        for key in sorted(before.keys() | after.keys())
        if before.get(key) != after.get(key)
    }


def is_silent(key: str) -> bool:
    """Whether a changed key needs no log line."""
    return not key.startswith(TOLD)


def _flat(values: dict, prefix: str = "") -> dict:
    flat: dict = {}
    for key, value in values.items():
        nested = isinstance(value, dict)
        flat |= _flat(value, f"{prefix}{key}.") if nested else {f"{prefix}{key}": value}
    return flat
