"""Processes that meet at a gate; threads play them."""

import contextlib
import dataclasses
import json
import socket
from concurrent.futures import ThreadPoolExecutor

import pytest

from swinsmt_jax.checks import UserError
from swinsmt_jax.runtime import gate, launchers


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(gate, "VISIBLE", 0.5)
    monkeypatch.setattr(gate, "PAUSE", 0.02)


def free_address():
    return f"127.0.0.1:{gate.free_port('127.0.0.1')}"


def place(index, *addresses, count=2, launcher=""):
    return launchers.Place(addresses, count, index, launcher=launcher)


@pytest.fixture
def start():
    """Begin to join in a thread; return the future."""
    with ThreadPoolExecutor(8) as pool:
        yield lambda where, folder, within=20: pool.submit(
            gate.join, where, folder, within=within
        )


def test_processes_of_a_run_meet_at_a_port_of_their_own(tmp_path, start):
    address, folder = free_address(), tmp_path / "runs" / "run"
    late = [start(place(i, address, count=3), folder) for i in (2, 1)]
    (met, bound) = start(place(0, address, count=3), folder).result()
    assert [one.result() for one in late] == [(met, None)] * 2
    assert met == bound and met != address
    assert not list(tmp_path.iterdir())  # what was made to meet is gone


def test_a_process_of_another_run_is_turned_away_and_nothing_else_happens(
    tmp_path, start, caplog
):
    address = free_address()
    first = start(place(0, address), tmp_path / "a")
    foreign = start(place(1, address), tmp_path / "b")
    with pytest.raises(UserError, match=r"b is not the same folder for all.*has .*/a"):
        foreign.result()
    assert not first.done() and "turned away process 1 of" in caplog.text
    second = start(place(1, address), tmp_path / "a")
    assert first.result()[0] == second.result()[0]
    for again in ("a", "b"):  # of a live run
        with pytest.raises(UserError, match="has its process 1 already; wait for"):
            start(place(1, address), tmp_path / again).result()
        with pytest.raises(UserError, match="cannot be opened here.*in use"):
            start(place(0, address), tmp_path / again).result()


def test_a_job_takes_another_port_than_that_of_another_job(tmp_path, start):
    taken, free = free_address(), free_address()
    one = [start(place(i, taken, launcher="job 1"), tmp_path) for i in (0, 1)]
    assert one[0].result()[0] == one[1].result()[0]
    two = [start(place(i, taken, free, launcher="job 2"), tmp_path) for i in (1, 0)]
    assert two[0].result()[0] == two[1].result()[0] != one[0].result()[0]


def test_a_job_whose_folder_is_not_shared_ends_in_all_processes(tmp_path, start):
    address = free_address()
    both = [
        start(place(i, address, launcher="job 1"), tmp_path / f"node{i}")
        for i in (0, 1)
    ]
    for one in both:
        with pytest.raises(UserError, match="node1 is not the same folder for all"):
            one.result()


def test_waiting_is_told_and_ends(tmp_path, start, caplog, monkeypatch):
    monkeypatch.setattr(gate, "SAID_EVERY", 0.3)
    caplog.set_level("INFO", logger="absl")
    address = free_address()
    words = rf"did not answer at {address} within 1 s \(.*refused\); look whether"
    with pytest.raises(UserError, match=words):
        start(place(1, address), tmp_path, within=1).result()
    assert caplog.text.count(f"waiting for process 0 at {address}") >= 3
    first = start(place(0, address, count=3), tmp_path, within=2)
    second = start(place(1, address, count=3), tmp_path, within=20)
    for one in (first, second):
        with pytest.raises(UserError, match="process 2 of 3 did not come to .* 2 s"):
            one.result()
    assert f"waiting for process 2 at {address}" in caplog.text


def connected(address):
    """Connect as soon as somebody listens there."""
    host, port = address.split(":")
    while True:
        with contextlib.suppress(ConnectionRefusedError):
            return socket.create_connection((host, int(port)))


def test_others_who_knock_are_passed_over(tmp_path, start):
    address = free_address()
    first = start(place(0, address), tmp_path)
    for said in (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", b"[]\n", b"{}\n", b""):
        with connected(address) as peer:
            peer.sendall(said)
    words = "with 2 processes, but this is process 1 of 3; give all the same"
    with pytest.raises(UserError, match=words):
        start(place(1, address, count=3), tmp_path).result()
    assert start(place(1, address), tmp_path).result()[0] == first.result()[0]


def test_one_that_went_away_while_it_waited_may_come_again(tmp_path, start):
    address = free_address()
    first = start(place(0, address, count=3), tmp_path)
    with connected(address) as peer:
        lines = peer.makefile("rb")
        hello = {
            "process": 1,
            "processes": 3,
            "launcher": "",
            "host": "a",
            "folder": "",
        }
        peer.sendall(json.dumps(hello).encode() + b"\n")
        token = (tmp_path / json.loads(lines.readline())["file"]).read_text()
        peer.sendall(json.dumps({"token": token}).encode() + b"\n")
        lines.close()
    others = [start(place(i, address, count=3), tmp_path) for i in (2, 1)]
    assert {one.result()[0] for one in others} == {first.result()[0]}


SLURM = {
    "SLURM_JOB_ID": "4711",
    "SLURM_STEP_ID": "0",
    "SLURM_STEP_NODELIST": "node[007-009],gpu1",
    "SLURM_NTASKS": "8",
    "SLURM_PROCID": "3",
    "SLURM_LOCALID": "1",
}
OPEN_MPI = {
    "OMPI_COMM_WORLD_SIZE": "8",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
    "OMPI_COMM_WORLD_RANK": "3",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
}


def test_each_step_of_a_job_has_ports_of_its_own():
    assert launchers.find({}) is None
    found = launchers.find(SLURM)
    assert (found.count, found.index, found.local_index) == (8, 3, 1)
    others = [
        launchers.find(SLURM | more)
        for more in (
            {"SLURM_STEP_ID": "1"},
            {"SLURM_JOB_ID": str(4711 + 4096)},
            {"SLURM_RESTART_COUNT": "1"},
        )
    ]
    assert launchers.find(dict(SLURM, SLURM_PROCID="0")).addresses == found.addresses
    firsts = {one.addresses[0] for one in (found, *others)}
    assert len(firsts) == 4 == len({one.launcher for one in (found, *others)})
    assert all(address.startswith("node007:6") for address in firsts)


URI, NAMESPACE = "OMPI_MCA_orte_hnp_uri", "PMIX_NAMESPACE"


@pytest.mark.parametrize(
    "more, host",
    [
        ({URI: "1531576320.0;tcp://10.96.0.1,10.1.0.1:34911"}, "10.96.0.1"),
        ({URI: "13.0;tcp6://[fe80::b9b,26::2]:43370"}, "[fe80::b9b]"),
        ({NAMESPACE: "prterun-node-a1-30208@1"}, "node-a1"),  # as by mpirun 5.0.11
        ({NAMESPACE: "?", "OMPI_COMM_WORLD_LOCAL_SIZE": "8"}, "localhost"),
    ],
)
def test_open_mpi_4_and_5_are_known(more, host):
    found = launchers.find(OPEN_MPI | more | {"JAX_COORDINATOR_PORT": "12345"})
    wanted = launchers.Place((f"{host}:12345",), 8, 3, local_index=1)
    assert dataclasses.replace(found, launcher="") == wanted and found.launcher


@pytest.mark.parametrize(
    "more, words",
    [
        ({NAMESPACE: "odd"}, "PMIX_NAMESPACE is 'odd' and does not name the"),
        (
            {NAMESPACE: "prte-a-1@1", "OMPI_COMM_WORLD_SIZE": "x"},
            "the launcher's number of processes is 'x', but must be a number",
        ),
    ],
)
def test_what_cannot_be_understood_is_refused_with_a_remedy(more, words):
    with pytest.raises(UserError, match=words):
        launchers.find(OPEN_MPI | more)
