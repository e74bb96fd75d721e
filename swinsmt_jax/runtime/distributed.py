"""How several processes find each other: the flags, and joining by them."""

import ipaddress
import os
import socket

import jax
from absl import flags, logging

from swinsmt_jax import checks
from swinsmt_jax.runtime import processes

flags.disclaim_key_flags()  # so that --help of a script lists what is defined here

MODES = ("off", "auto")
BIND_ADDRESS = "JAX_COORDINATOR_BIND_ADDRESS"
EXPLICIT = ("coordinator_address", "num_processes", "process_id")


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
        _require_free(arguments["coordinator_bind_address"])
    try:
        jax.distributed.initialize(**arguments)
    except ValueError as error:
        raise checks.UserError(
            "--distributed=auto found no cluster; start the script by srun, "
            f"mpirun or on every host of a TPU pod, or give {_listing(EXPLICIT)}."
        ) from error
    _require_equal_devices(values)
    if not processes.is_first():
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
    address = values.coordinator_address
    return {
        "coordinator_address": address,
        # else JAX opens the port on all interfaces
        "coordinator_bind_address": os.environ.get(BIND_ADDRESS, address),
        "num_processes": values.num_processes,
        "process_id": values.process_id,
        "local_device_ids": ids,
        # else SLURM's variables would restrict the process to one device
        "cluster_detection_method": "deactivate",
    }


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
    """Refuse a port that cannot be opened, for which JAX would crash."""
    host, _, port = address.rpartition(":")
    host = host.strip("[]")
    try:
        family, *_, place = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        socket.create_server(place[:2], family=family).close()
    except OSError as error:
        raise checks.UserError(
            f"--coordinator_address is {address}, but its port cannot be opened here, "
            f"in process 0: {error.strerror}; choose another port, or an address of "
            f"this host, the same in all processes. {BIND_ADDRESS} names an interface "
            "to listen on where the others know this host by another address."
        ) from error
    if ipaddress.ip_address(place[0]).is_loopback and host not in (
        "localhost",
        place[0],
    ):
        logging.warning(
            "%s is %s here: processes on other hosts cannot reach it; give the address "
            "of an interface",
            *(host, place[0]),
        )


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
        raise processes.SharedError(
            f"the processes have {_joined(counts)} devices, but each must have the "
            "same number: take whole nodes, or as many --local_device_ids on each."
        )


def _listing(names):
    return ", ".join(f"--{name}" for name in names)


def _joined(items):
    return ",".join(str(item) for item in items)
