import socket

import pytest
from absl import flags

from swinsmt_jax.checks import UserError
from swinsmt_jax.runtime import distributed, launchers, processes

EXPLICIT = (
    "--coordinator_address=node1:1234",
    "--num_processes=4",
    "--process_id=3",
)


def parse(*arguments):
    values = flags.FlagValues()
    distributed.define_flags(values)
    values(["train.py", *arguments])
    return values


@pytest.mark.parametrize("arguments", [(), ("--distributed=off",)])
def test_one_process_is_the_default(arguments):
    assert distributed.place_of(parse(*arguments)) is None
    distributed.start("run", parse(*arguments))
    assert not processes.several() and processes.is_first()


def test_flags_become_a_place(monkeypatch):
    assert distributed.place_of(parse("--distributed=auto")) is None
    explicit = distributed.place_of(parse(*EXPLICIT, "--local_device_ids=2"))
    assert explicit == launchers.Place(("node1:1234",), 4, 3)
    monkeypatch.setenv(distributed.BIND_ADDRESS, "0.0.0.0:1234")
    assert distributed.place_of(parse(*EXPLICIT)).bind == "0.0.0.0:1234"


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["--distributed=auto", EXPLICIT[1]], "auto does not go with --num_processes"),
        (["--distributed=off", *EXPLICIT], "off does not go with --coordinator_addr"),
        (EXPLICIT[:1], "--coordinator_address needs --num_processes, --process_id too"),
        (EXPLICIT[1:], "--num_processes, --process_id needs --coordinator_address"),
        ([*EXPLICIT, "--num_processes=0"], "--num_processes is 0, but must be a whole"),
        ([*EXPLICIT, "--process_id=4"], r"--process_id is 4, but must lie in \[0, 3\]"),
        ([*EXPLICIT, "--process_id=-1"], "--process_id is -1"),
        ([*EXPLICIT, "--coordinator_address=node1"], "is 'node1', but must be host:"),
        ([*EXPLICIT, "--coordinator_address=node1:x"], "is 'node1:x', but must be"),
        ([*EXPLICIT, "--coordinator_address=a:70000"], "is 'a:70000', but must be"),
        (["--local_device_ids=0"], "--local_device_ids=0 needs --distributed=auto or"),
        ([*EXPLICIT, "--local_device_ids=0,a"], "is '0,a', but must be numbers"),
        ([*EXPLICIT, "--local_device_ids="], "is '', but must be numbers"),
        ([*EXPLICIT, "--local_device_ids=1,1"], "is 1,1, but must name each"),
    ],
)
def test_flags_that_do_not_fit_are_refused(tmp_path, arguments, words):
    with pytest.raises(UserError, match=words):
        distributed.start(tmp_path, parse(*arguments))


def test_an_address_of_another_host_is_refused(tmp_path):
    address = "--coordinator_address=192.0.2.1:12345"  # of documents, never given out
    with pytest.raises(UserError, match="cannot be opened here.*BIND_ADDRESS names"):
        distributed.start(
            tmp_path, parse(address, "--num_processes=2", "--process_id=0")
        )


def test_a_port_in_use_is_refused(tmp_path):
    with socket.create_server(("", 0)) as taken:
        address = f"--coordinator_address=localhost:{taken.getsockname()[1]}"
        with pytest.raises(UserError, match="cannot be opened here.*in use"):
            distributed.start(
                tmp_path, parse(address, "--num_processes=2", "--process_id=0")
            )
