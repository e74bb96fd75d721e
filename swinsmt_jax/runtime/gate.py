"""How the processes of a run find each other, and keep others out.

Process 0 listens at the run's address for as long as it lives. JAX's coordinator
listens at a port that process 0 tells only to the other processes of its run. Each of
these names its run and its number, and proves that it sees the run's folder: it reads a
file that process 0 has just written there. A process that cannot is refused with the
reason, and the run continues. Only lines of JSON are sent.
"""

import contextlib
import hmac
import ipaddress
import itertools
import json
import platform
import secrets
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NoReturn

from absl import logging

from swinsmt_jax import checks
from swinsmt_jax.runtime import files
from swinsmt_jax.runtime.launchers import Place

TOKEN = ".run-"  # begins the name of the file that all processes read
SAID_EVERY = 30.0  # seconds between two lines about waiting
PATIENCE = 20.0  # seconds for an answer of the other side
ANSWER = 5.0  # seconds for its host to answer at all
VISIBLE = 10.0  # seconds in which a new file is seen by all hosts
LONGEST = 10_000  # bytes of a line
PAUSE = 0.3  # seconds between two tries


def join(place: Place, folder: Path, *, within: float) -> tuple[str, str | None]:
    """Meet the other processes of a run; return the addresses of JAX's coordinator.

    Args:
        place: of this process.
        folder: of the run, which all processes see.
        within: seconds in which all must have come.

    Returns:
        host:port at which it is reached, and that at which it listens in process 0;
        None for all interfaces.

    Raises:
        UserError: for ports that cannot be opened, an address of another run, processes
            that did not come in time, and a folder that is not the same for all.
    """
    deadline = time.monotonic() + within
    if place.index:
        return _join_first(place, folder, deadline, within), None
    gate, address = _open(place)
    with _token(folder) as (name, token):
        gate = _Gate(gate, place, folder, name, token)
        port = free_port(_bound_host(place, address))
        gate.wait(address, port, deadline, within)
    host, bound = _split(address)[0], _bound_host(place, address)
    return _joined(host, port), _joined(bound, port) if bound else None


class _Gate:
    """Admits the processes of a run; threads answer all that connect, to the end."""

    def __init__(self, server, place, folder, name, token):
        self._server, self._place, self._folder = server, place, folder
        self._name, self._token = name, token
        self._changed = threading.Condition()
        self._there: dict[int, socket.socket] = {}
        self._turned_away: list[str] = []
        self._failure, self._closed = "", False
        threading.Thread(target=self._accept, daemon=True).start()

    def wait(self, address, port, deadline, within):
        """Wait until all are there, and tell them the port of JAX."""
        others, said = set(range(1, self._place.count)), time.monotonic()
        if others:
            logging.info("waiting for %d processes at %s", len(others), address)
        with self._changed:
            while (missing := others - self._there.keys()) and not self._failure:
                if time.monotonic() > deadline:
                    away = "".join(f" {words}" for words in self._turned_away[-3:])
                    self._failure = (
                        f"process {_listing(missing)} of {self._place.count} did not "
                        f"come to {address} within {within:g} s.{away} Start all "
                        "processes with the same address and number of processes; "
                        "--join_timeout gives more time."
                    )
                elif time.monotonic() > said + SAID_EVERY:
                    said = time.monotonic()
                    logging.info(
                        "waiting for process %s at %s", _listing(missing), address
                    )
                self._changed.wait(PAUSE)
            self._closed = True
            answer = {"refused": self._failure} if self._failure else {"port": port}
            for connection in self._there.values():
                with contextlib.suppress(OSError):
                    _send(connection, answer)
        if self._failure:
            self._server.close()
            raise checks.UserError(self._failure)

    def _accept(self):
        while True:
            try:
                connection, peer = self._server.accept()
            except OSError:  # such as of a connection that is gone again
                if self._server.fileno() == -1:
                    return
                time.sleep(PAUSE)
                continue
            threading.Thread(
                target=self._answer, args=(connection, peer), daemon=True
            ).start()

    def _answer(self, connection, peer):
        with (
            contextlib.suppress(OSError, ValueError, KeyError, TypeError),
            connection,
            connection.makefile("rb") as lines,
        ):
            connection.settimeout(PATIENCE)
            hello = _receive(lines)
            index, launcher = int(hello["process"]), str(hello["launcher"])
            what = f"process {index} of {checks.printable(str(hello['host']))}"
            refused = self._refuses(hello, index)
            if not refused:
                _send(connection, {"file": self._name})
                shown = str(_receive(lines).get("token", ""))
                if not hmac.compare_digest(shown.encode(), self._token.encode()):
                    refused = self._of_another_folder(hello)
                    with self._changed:
                        if launcher and not self._closed:  # of this run all the same
                            self._failure = f"{what}: {refused}"
                            self._changed.notify_all()
            refused = refused or self._keep(connection, index) or ""
            if refused:
                self._turn_away(what, refused)
                _send(connection, {"refused": refused})
                return
            connection.settimeout(None)
            lines.read(1)  # until it goes away
            with self._changed:
                if not self._closed:
                    del self._there[index]

    def _refuses(self, hello, index):
        mine, count = self._place, int(hello["processes"])
        whose = f"{platform.node()} runs process 0 of {self._folder} at this address"
        if str(hello["launcher"]) != mine.launcher:
            return f"{whose}, which is another run; choose another port."
        if self._closed or index in self._there:
            return self._has(index)
        if count != mine.count or not 0 < index < count:
            return (
                f"{whose} with {mine.count} processes, but this is process {index} of "
                f"{count}; give all the same --num_processes, or choose another port."
            )
        return ""

    def _of_another_folder(self, hello):
        theirs = checks.printable(str(hello["folder"]))
        return (
            f"the workdir {theirs} is not the same folder for all processes: "
            f"process 0 on {platform.node()} has {self._folder}, and what it wrote "
            "there is not seen. Give a --workdir on a file system that all hosts "
            "share, or, if that is another run, choose another port."
        )

    def _turn_away(self, what, words):
        with self._changed:
            if not self._closed:
                self._turned_away.append(f"Turned away: {what}.")
        logging.warning("turned away %s: %s", what, words)

    def _has(self, index):
        return (
            f"{platform.node()} runs process 0 of {self._folder} at this address, and "
            f"that run has its process {index} already; wait for it or end it, or "
            "choose another port."
        )

    def _keep(self, connection, index):
        """Hold a place for a process; return why not, if another was first."""
        with self._changed:
            if self._closed or index in self._there:
                return self._has(index)
            self._there[index] = connection
            self._changed.notify_all()


def _join_first(place, folder, deadline, within):
    """Come to process 0 and wait for the others; return the address of JAX."""
    said, reason = 0.0, ""
    for address in itertools.cycle(place.addresses):
        if time.monotonic() > said + SAID_EVERY or not said:
            said = time.monotonic()
            logging.info(
                "process %d: waiting for process 0 at %s, for up to %d s%s",
                *(place.index, address, max(0, round(deadline - said)), reason),
            )
        try:
            port = _come(address, place, folder, deadline, within)
            if port is not None:
                return _joined(_split(address)[0], port)
        except OSError as error:
            reason = f" ({error.strerror or checks.one_line(error)})"
        if time.monotonic() > deadline:
            _too_late(address, within, "process 0 did not answer", reason)
        time.sleep(PAUSE)


def _come(address, place, folder, deadline, within):
    """Return the port that process 0 sends; None if it belongs to another run.

    Raises:
        OSError: if nobody is there.
        UserError: if it says why this process cannot join.
    """
    only = len(place.addresses) == 1
    with (
        socket.create_connection(_split(address), timeout=ANSWER) as connection,
        connection.makefile("rb") as lines,
    ):
        connection.settimeout(PATIENCE)
        hello = {
            **{"process": place.index, "processes": place.count},
            **{"launcher": place.launcher, "host": platform.node()},
            "folder": str(folder),
        }
        _send(connection, hello)
        answer = _receive(lines)
        if "file" in answer:
            _send(connection, {"token": _read(folder / Path(answer["file"]).name)})
            logging.info("process %d: has come to %s", place.index, address)
            answer = _wait_for(connection, address, deadline, within)
        elif not only and "is another run" in answer["refused"]:
            return None
    checks.require("port" in answer, f"{address}: {answer.get('refused')}")
    return int(answer["port"])


def _wait_for(connection, address, deadline, within):
    """Return what process 0 says once all are there."""
    while True:
        connection.settimeout(SAID_EVERY)
        # a new file each time: one that has timed out cannot be read again
        with contextlib.suppress(TimeoutError), connection.makefile("rb") as lines:
            return _receive(lines)
        if time.monotonic() > deadline + PATIENCE:
            _too_late(address, within, "the other processes did not come")
        logging.info("waiting for the other processes at %s", address)


def _too_late(address, within, what, reason="") -> NoReturn:
    raise checks.UserError(
        f"{what} at {address} within {within:g} s{reason}; look whether it has "
        "started, and whether this is an address of its host that can be reached from "
        "here. "
        "--join_timeout gives more time."
    )


def _read(file):
    """Return what process 0 wrote; nothing if this host does not see it."""
    deadline = time.monotonic() + VISIBLE
    while time.monotonic() < deadline:
        with contextlib.suppress(OSError):
            return file.read_text()
        time.sleep(PAUSE)
    return ""


@contextlib.contextmanager
def _token(folder: Path) -> Iterator[tuple[str, str]]:
    """Write a file that only those read who see the folder; give name and content."""
    name, token = TOKEN + secrets.token_hex(8), secrets.token_hex(16)
    above = [folder, *folder.parents]
    made = [path for path in above if not path.exists()]
    file = folder / name
    try:
        with files.writable(folder):
            folder.mkdir(parents=True, exist_ok=True)
            file.write_text(token)
        yield name, token
    finally:
        file.unlink(missing_ok=True)
        with contextlib.suppress(OSError):  # of folders that others write to now
            for path in made:
                path.rmdir()


def _open(place):
    """Listen at the first address that is free; return the socket and the address."""
    for address in place.addresses:
        host = _bound_host(place, address)
        _, port = _split(address if place.launcher else place.bind or address)
        try:
            return _listen(host, port), address
        except OSError as error:
            failure = error
    tried = place.addresses[0]
    raise checks.UserError(
        f"--coordinator_address is {tried}, but its port cannot be opened here, in "
        f"process 0: {failure.strerror}; choose another port, or an address of this "
        "host, the same in all processes. JAX_COORDINATOR_BIND_ADDRESS names an "
        "interface to listen on where the others know this host by another address."
        if not place.launcher
        else f"{place.launcher}: none of {len(place.addresses)} ports from {tried} on "
        f"can be opened here, in process 0: {failure.strerror}; give a free one as "
        "JAX_COORDINATOR_PORT, the same in all processes."
    )


def _listen(host, port):
    if not host and socket.has_dualstack_ipv6():
        return socket.create_server(
            ("", port), family=socket.AF_INET6, dualstack_ipv6=True
        )
    family, *_, place = socket.getaddrinfo(
        host or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
    )[0]
    server = socket.create_server(place[:2], family=family)
    known = ("", "localhost", place[0])
    if ipaddress.ip_address(place[0]).is_loopback and host not in known:
        logging.warning(
            "%s is %s here: processes on other hosts cannot reach it; give the address "
            "of an interface",
            *(host, place[0]),
        )
    return server


def free_port(host: str) -> int:
    """Return a port that the system finds free now; "" for all interfaces."""
    with _listen(host, 0) as probe:
        return probe.getsockname()[1]


def _bound_host(place, address):
    """Return the host at which process 0 listens; "" for all interfaces.

    By hand it is that of the address, or JAX would open all.
    """
    if place.bind or not place.launcher:
        return _split(place.bind or address)[0]
    host = _split(address)[0]
    return host if host == "localhost" else ""


def _split(address):
    host, _, port = address.rpartition(":")
    return host.strip("[]"), int(port)


def _joined(host, port):
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _send(connection, content):
    connection.sendall(json.dumps(content).encode() + b"\n")


def _receive(lines):
    """Return an object that was sent; `ConnectionError` for anything else."""
    line = lines.readline(LONGEST)
    try:
        content = json.loads(line)
    except ValueError:
        content = None
    if not isinstance(content, dict):
        raise ConnectionError("no line of JSON came")
    return content


def _listing(numbers):
    return ", ".join(map(str, sorted(numbers)))
