"""What SLURM and Open MPI tell a process about its run."""

import hashlib
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass

from swinsmt_jax import checks

PORT, ADDRESS = "JAX_COORDINATOR_PORT", "JAX_COORDINATOR_ADDRESS"
FIRST_PORT, PORTS = 61440, 4096  # above those that Linux gives out by itself
TRIES = 16  # ports of a run, of which the first free one is taken
SLURM = ("SLURM_JOB_ID", "SLURM_STEP_NODELIST", "SLURM_NTASKS", "SLURM_PROCID")


@dataclass(frozen=True)
class Place:
    """Which process of which run this is, and where it joins the others.

    Attributes:
        addresses: host:port of process 0, which takes the first that is free.
        count: of the processes.
        index: of this one, from 0.
        bind: host:port at which process 0 listens instead; "" for all interfaces.
        launcher: name that the launcher gave to the run; "" if started by hand.
        local_index: of this process on its node; None if unknown.
    """

    addresses: tuple[str, ...]
    count: int
    index: int
    bind: str = ""
    launcher: str = ""
    local_index: int | None = None


def find(environment: Mapping[str, str] = os.environ) -> Place | None:
    """Return the place that SLURM or Open MPI 4 or 5 gives; None without them.

    Raises:
        UserError: for variables of them that cannot be understood.
    """
    if all(name in environment for name in SLURM):
        return _slurm(environment)
    if "OMPI_COMM_WORLD_RANK" in environment:
        return _open_mpi(environment)
    return None


def _slurm(environment):
    nodes = environment["SLURM_STEP_NODELIST"]
    found = re.match(r"([^,\[]+)(?:\[([^,\-\]]+))?", nodes)
    checks.require(
        found is not None,
        f"SLURM_STEP_NODELIST is {nodes!r}, in which no node is named; give "
        "--coordinator_address instead of --distributed=auto.",
    )
    parts = ("SLURM_JOB_ID", "SLURM_STEP_ID", "SLURM_RESTART_COUNT")
    run = "SLURM job " + ".".join(environment.get(part, "0") for part in parts)
    count = environment.get("SLURM_STEP_NUM_TASKS", environment["SLURM_NTASKS"])
    host = found[1] + (found[2] or "")
    return _place(environment, run, host, (count, "SLURM_PROCID", "SLURM_LOCALID"))


def _open_mpi(environment):
    """Open MPI 4 names its head by an address, 5 within the name of the job."""
    variables = ("OMPI_MCA_orte_hnp_uri", "PMIX_NAMESPACE")
    uri, namespace = (environment.get(name, "") for name in variables)
    count = environment.get("OMPI_COMM_WORLD_SIZE", "")
    old = re.search(r"tcp://(.+?)[,:]|tcp6://\[(.+?)[,\]]", uri)
    new = re.match(r"\w+-(.+)-\d+@", namespace)
    if old:
        host = old[1] or f"[{old[2]}]"
    elif count == environment.get("OMPI_COMM_WORLD_LOCAL_SIZE"):
        host = "localhost"
    else:
        checks.require(
            new is not None,
            f"Open MPI started this process, but PMIX_NAMESPACE is {namespace!r} and "
            "does not name the host of mpirun; give --coordinator_address=HOST:PORT "
            "--num_processes=$OMPI_COMM_WORLD_SIZE --process_id=$OMPI_COMM_WORLD_RANK "
            "instead of --distributed=auto.",
        )
        host = new[1]
    names = (count, "OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_LOCAL_RANK")
    return _place(environment, f"Open MPI {uri or namespace}", host, names)


def _place(environment, run, host, names):
    known = {"number of processes": names[0]}
    known |= {name: environment.get(name, "") for name in names[1:]}
    for name, value in known.items():
        checks.require(
            value.isdecimal(),
            f"the launcher's {name} is {value!r}, but must be a number; give "
            "--coordinator_address, --num_processes and --process_id instead of "
            "--distributed=auto.",
        )
    count, index, local = map(int, known.values())
    ports = [environment[PORT]] if PORT in environment else _ports(run)
    addresses = tuple(f"{host}:{port}" for port in ports)
    if ADDRESS in environment:
        addresses = (environment[ADDRESS],)
    return Place(addresses, count, index, launcher=run, local_index=local)


def _ports(run):
    """Return ports that are always the same for a run, and others for another."""
    digest = hashlib.sha256(run.encode()).digest()
    numbers = (int.from_bytes(digest[i : i + 2]) for i in range(0, 2 * TRIES, 2))
    return [FIRST_PORT + number % PORTS for number in numbers]
