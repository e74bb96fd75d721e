"""Flags with which several processes find each other, and how they join."""

import dataclasses
import os
from pathlib import Path

import jax
from absl import flags, logging

from swinsmt_jax import checks
from swinsmt_jax.runtime import gate, launchers, processes
from swinsmt_jax.runtime.files import absolute

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
    flags.DEFINE_integer(
        "join_timeout",
        300,
        "seconds to wait for the other processes",
        lower_bound=1,
        flag_values=values,
    )


def start(folder: str | Path, values: flags.FlagValues = flags.FLAGS) -> None:
    """Join the other processes, as the flags say. Call before any use of a device.

    Args:
        folder: of the run, which all processes share; see `gate`.
        values: with the flags.

    Raises:
        UserError: for flags that do not fit together, no cluster to detect, a port in
            use or of another run, processes that do not come in time, a folder that is
            not shared, and processes that differ in their number of devices.
    """
    place = place_of(values)
    if place is None and values.distributed == "off":
        return
    # JAX listens for SIGTERM alone: see `signals`
    jax.config.update("jax_enable_preemption_service", False)
    arguments = {
        "local_device_ids": _device_ids(values.local_device_ids),
        "initialization_timeout": values.join_timeout,
    }
    if place is None:
        logging.info(
            "waiting for the other processes as JAX finds them, for up to %d s",
            values.join_timeout,
        )
    else:
        arguments |= _join(
            place, absolute(folder), arguments["local_device_ids"], values.join_timeout
        )
    try:
        jax.distributed.initialize(**arguments)
    except ValueError as error:
        raise checks.UserError(
            "--distributed=auto found no cluster: no variables of SLURM, Open MPI, "
            "Kubernetes or a TPU pod. Start the script by srun, Open MPI's mpirun or "
            f"on every host of a TPU pod, or give {_listing(EXPLICIT)}; under another "
            "MPI these are a free port of the first host, $PMI_SIZE and $PMI_RANK."
        ) from error
    _require_equal_devices(values)
    if not processes.is_first():
        logging.set_verbosity(logging.WARNING)
    logging.info(
        "%d processes of %d devices each",
        jax.process_count(),
        jax.local_device_count(),
    )


def _join(place, folder, device_ids, within):
    """Meet the others, and return what JAX needs to know of them."""
    address, bound = gate.join(place, folder, within=within)
    if device_ids is None and place.local_index is not None:
        device_ids = [place.local_index]
    return {
        "coordinator_address": address,
        "coordinator_bind_address": bound,
        "num_processes": place.count,
        "process_id": place.index,
        "local_device_ids": device_ids,
        # else SLURM's variables would restrict the process to one device
        "cluster_detection_method": "deactivate",
    }


def place_of(values: flags.FlagValues) -> launchers.Place | None:
    """Return where the flags, or with them the launcher, place this process.

    None for one process, and where JAX has to find the others, as on a TPU pod.

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
    bind = os.environ.get(BIND_ADDRESS, "")
    if auto:
        place = launchers.find()
        return place and dataclasses.replace(place, bind=bind)
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
    return launchers.Place(
        (address,), values.num_processes, values.process_id, bind=bind
    )


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
