"""Several processes: how they find each other, share work, and fail together.

Each process runs the same script. What concerns a file or the screen is done by the
first one; what may fail on one alone runs in `together`, so that none waits in vain.
"""

import itertools
import os
import pickle
import socket
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from typing import NoReturn, TypeVar

import jax
import numpy as np
from absl import flags, logging
from jax.experimental import multihost_utils
from orbax.checkpoint import multihost

from swinsmt_jax import checks

T = TypeVar("T")

MODES = ("off", "auto")
EXPLICIT = ("coordinator_address", "num_processes", "process_id")
LONGEST_WAIT_MS = 24 * 3600 * 1000  # for the slowest process, such as in validation

_meetings = itertools.count()


class SharedError(checks.UserError):
    """A `UserError` that all processes raise, for the first one to print."""


def define_flags(values: flags.FlagValues = flags.FLAGS) -> None:
    """Define the flags by which the processes of a run find each other."""
    flags.DEFINE_enum(
        "distributed",
        MODES[0],
        MODES,
        "auto: join the processes that SLURM, Open MPI or a TPU pod has started",
        flag_values=values,
    )
    flags.DEFINE_string(
        "coordinator_address",
        None,
        "host:port of process 0, instead of --distributed=auto",
        flag_values=values,
    )
    flags.DEFINE_integer(
        "num_processes", None, "number of processes, if not auto", flag_values=values
    )
    flags.DEFINE_integer(
        "process_id", None, "of this process, from 0, if not auto", flag_values=values
    )
    flags.DEFINE_list(
        "local_device_ids",
        None,
        "GPUs of the node that this process takes, such as 0,1,2,3; by default one "
        "with auto under SLURM and Open MPI, else all",
        flag_values=values,
    )


def start(values: flags.FlagValues = flags.FLAGS) -> None:
    """Join the other processes, as the flags say. Call before any use of a device.

    Raises:
        UserError: for flags that do not fit together, no cluster to detect, a port in
            use, and processes that differ in their number of devices.
    """
    arguments = arguments_of(values)
    if arguments is None:
        return
    if arguments.get("process_id") == 0:
        _require_free(arguments["coordinator_address"])
    try:
        jax.distributed.initialize(**arguments)
    except (ValueError, TypeError) as error:
        raise checks.UserError(
            f"--distributed=auto found no cluster; start the script by srun, "
            f"mpirun or on every host of a TPU pod, or give {_listing(EXPLICIT)}."
        ) from error
    _require_equal_devices(values)
    if not is_first():
        logging.set_verbosity(logging.WARNING)
    logging.info(
        "%d processes of %d devices each",
        jax.process_count(),
        jax.local_device_count(),
    )


def arguments_of(values: flags.FlagValues) -> dict | None:
    """Return the arguments of `jax.distributed.initialize`; None for one process.

    Raises:
        UserError: for flags that do not fit together or are out of range.
    """
    given = [name for name in EXPLICIT if values[name].value is not None]
    auto = values.distributed == "auto"
    checks.require(
        not (given and (auto or values["distributed"].present)),
        f"--distributed={values.distributed} does not go with {_listing(given)}; "
        "leave out one or the other.",
    )
    ids = _device_ids(values.local_device_ids)
    if auto:
        return {"local_device_ids": ids}
    if not given:
        checks.require(
            ids is None,
            f"--local_device_ids={_joined(ids or ())} needs --distributed=auto or "
            f"{_listing(EXPLICIT)}; for one process, CUDA_VISIBLE_DEVICES chooses.",
        )
        return None
    missing = [name for name in EXPLICIT if name not in given]
    checks.require(
        not missing,
        f"{_listing(given)} needs {_listing(missing)} too, or --distributed=auto "
        "instead of all of them.",
    )
    checks.positive("--num_processes", values.num_processes)
    checks.in_range("--process_id", values.process_id, 0, values.num_processes - 1)
    _check_address(values.coordinator_address)
    return {
        "coordinator_address": values.coordinator_address,
        "num_processes": values.num_processes,
        "process_id": values.process_id,
        "local_device_ids": ids,
        # else SLURM's variables would restrict the process to one device
        "cluster_detection_method": "deactivate",
    }


def is_first() -> bool:
    """Whether this is the process that writes files and talks to the user."""
    return jax.process_index() == 0


def gather(value: T) -> list[T]:
    """Return the value of each process, in their order; all must call this.

    Values are pickled, and small: each process gets all of them.
    """
    if jax.process_count() == 1:
        return [value]
    # Processes may be minutes apart, but collectives on CPU wait for 30 seconds only.
    meet = multihost.get_barrier_sync_fn()
    meet(key=f"swinsmt_jax.gather.{next(_meetings)}", timeout_ms=LONGEST_WAIT_MS)
    own = np.frombuffer(pickle.dumps(value), np.uint8)
    sizes = multihost_utils.process_allgather(np.int32(own.size)).ravel()
    padded = np.zeros(1 << int(sizes.max() - 1).bit_length(), np.uint8)  # few shapes
    padded[: own.size] = own
    found = np.asarray(multihost_utils.process_allgather(padded))
    found = found.reshape(len(sizes), -1)
    return [
        pickle.loads(part[:size].tobytes())
        for part, size in zip(found, sizes, strict=True)
    ]


def together(function: Callable[[], T]) -> T:
    """Call in all processes; return this one's result if none raised a `UserError`.

    Raises:
        SharedError: in all processes, what the first one that failed has to say. A
            single process raises its own `UserError`.
    """
    if jax.process_count() == 1:
        return function()
    result, message = None, None
    try:
        result = function()
    except checks.UserError as error:
        message = str(error)
    failed = [text for text in gather(message) if text is not None]
    if failed:
        raise SharedError(failed[0])
    return result


def share(items: Sequence[T]) -> Sequence[T]:
    """Return this process's part of the items: every n-th for n processes."""
    return items[jax.process_index() :: jax.process_count()]


def unshare(own: Sequence[T]) -> list[T]:
    """Return what all processes made of their `share` of items, in the items' order."""
    parts = gather(list(own))
    longest = max(len(part) for part in parts)
    return [part[i] for i in range(longest) for part in parts if i < len(part)]


def require_same(values: Mapping[str, object]) -> None:
    """Raise `SharedError` unless all processes have the same values by name."""
    parts = gather(dict(values))
    differing = [
        f"{name} is {first!r} in process 0, but {part.get(name)!r} in process {i}"
        for name, first in parts[0].items()
        for i, part in enumerate(parts)
        if part.get(name) != first
    ]
    if differing:
        raise SharedError(
            f"the processes do not run the same experiment: {'; '.join(differing[:3])}."
            " Start all with the same flags and the same data."
        )


def abandon(status: int) -> NoReturn:
    """End this process at once, without waiting for the others, who may hang.

    They are ended by the launcher, or by JAX when it misses the heartbeat.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def abandon_on_error(error: Exception) -> None:
    """Print the traceback and end this process, if others would wait for it."""
    if several():
        traceback.print_exception(error)
        abandon(1)


def several() -> bool:
    """Whether this process has joined others. Does not touch the devices."""
    return jax.distributed.is_initialized() and jax.process_count() > 1


def _device_ids(texts):
    if texts is None:
        return None
    checks.require(
        bool(texts) and all(text.strip().isdecimal() for text in texts),
        f"--local_device_ids is {_joined(texts)!r}, but must be numbers of devices "
        "with commas between, such as 0,1,2,3.",
    )
    ids = [int(text) for text in texts]
    checks.require(
        len(set(ids)) == len(ids),
        f"--local_device_ids is {_joined(ids)}, but must name each device once.",
    )
    return ids


def _check_address(address):
    host, _, port = address.rpartition(":")
    checks.require(
        bool(host) and port.isdecimal() and 1 <= int(port) <= 65535,
        f"--coordinator_address is {address!r}, but must be host:port of process 0, "
        "such as node001:12345.",
    )


def _require_free(address):
    """Refuse a port that is taken, for which JAX would crash."""
    try:
        socket.create_server(("", int(address.rpartition(":")[2]))).close()
    except OSError as error:
        raise checks.UserError(
            f"--coordinator_address is {address}, but its port cannot be opened here, "
            f"in process 0: {error.strerror}; choose another one, the same in all "
            "processes."
        ) from error


def _require_equal_devices(values):
    try:
        devices = jax.devices()
    except RuntimeError as error:
        raise checks.UserError(
            f"the devices of this process cannot be opened ({error}); "
            f"--local_device_ids is {_joined(values.local_device_ids or ['unset'])}, "
            "and must name devices that the process sees. Under SLURM with "
            "--gpus-per-task each process sees one, which is 0."
        ) from error
    counts = [0] * jax.process_count()
    for device in devices:
        counts[device.process_index] += 1
    if len(set(counts)) > 1:
        raise SharedError(
            f"the processes have {_joined(counts)} devices, but each must have the "
            "same number: take whole nodes, or as many --local_device_ids on each."
        )


def _listing(names):
    return ", ".join(f"--{name}" for name in names)


def _joined(items):
    return ",".join(str(item) for item in items)
