import signal

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from swinsmt_jax.checks import UserError
from swinsmt_jax.runtime import processes, statuses


def test_one_process_has_all_of_the_work():
    items = list(range(5))
    assert processes.shard(items) == items == processes.unshard(items)
    assert processes.gather("x") == ["x"]
    assert processes.run_on_all(lambda: 3) == 3

    def fail():
        raise UserError("bad file")

    with pytest.raises(UserError, match="bad file"):
        processes.run_on_all(fail)


@pytest.fixture
def as_process(monkeypatch):
    """Play one of three processes, all of whose values are known beforehand."""

    def play(index, values):
        monkeypatch.setattr(processes.jax, "process_count", lambda: 3)
        monkeypatch.setattr(processes.jax, "process_index", lambda: index)
        monkeypatch.setattr(processes, "gather", lambda value: values)

    return play


@pytest.mark.parametrize("count", [0, 2, 3, 7])
def test_shared_items_come_back_in_order(as_process, count):
    items = [f"s{i}" for i in range(count)]
    parts = []
    for i in range(3):
        as_process(i, None)
        parts.append(processes.shard(items))
    as_process(1, parts)
    assert processes.unshard(parts[1]) == items


def test_an_error_of_one_process_is_raised_in_all(as_process):
    fine = (None, None)
    as_process(1, [fine, fine, ("bad file in the last", None)])
    with pytest.raises(processes.SharedError, match="bad file in the last"):
        processes.run_on_all(lambda: 3)
    as_process(1, [fine, fine, fine])
    assert processes.run_on_all(lambda: 3) == 3


def test_a_signal_that_ends_one_process_ends_all(as_process):
    ended = {"number": signal.SIGINT, "step": 4, "stop": 9}
    as_process(1, [(None, None), (None, None), (None, ended)])
    with pytest.raises(statuses.Interrupted, match="SIGINT received: .* step 4 of 9"):
        processes.run_on_all(lambda: 3)


def test_processes_with_other_values_are_refused(as_process):
    as_process(1, [{"a": 1, "b": 2}, {"a": 1, "b": 2}, {"a": 1, "b": 5}])
    with pytest.raises(processes.SharedError, match="b is 2 in .* 0, but 5 in .* 2"):
        processes.require_same({"a": 1, "b": 2})


def test_what_is_compiled_ahead_is_so_without_jit_too():
    one = jnp.ones(3)
    with jax.disable_jit():
        program = processes.compiled(jax.jit(lambda x: x + 1), one)
    np.testing.assert_array_equal(program(one), 2)
