import logging

import jax
import pytest
from absl import logging as absl_logging

from swinsmt_jax.checks import UserError
from swinsmt_jax.runtime import startup


def test_a_user_error_is_one_line_and_status_2(capsys):
    with pytest.raises(SystemExit) as stop, startup.exit_on_user_error("x.py"):
        raise UserError("too small")
    assert stop.value.code == 2
    assert capsys.readouterr().err == "x.py: too small\n"


def test_other_errors_keep_their_traceback():
    with pytest.raises(ZeroDivisionError), startup.exit_on_user_error("x.py"):
        raise ZeroDivisionError


@pytest.mark.parametrize(
    "path, level, shown",
    [
        (f"{startup.PACKAGE}/training/loop.py", logging.INFO, True),
        ("/lib/orbax/checkpoint/manager.py", logging.WARNING, False),
        ("/lib/orbax/checkpoint/manager.py", logging.ERROR, True),
        ("/lib/jax/xla_bridge.py", logging.INFO, False),
        ("/lib/jax/xla_bridge.py", logging.WARNING, True),
    ],
)
def test_log_lines_are_those_for_users(path, level, shown):
    record = logging.LogRecord("absl", level, path, 1, "text", (), None)
    assert startup._is_for_users(record) == shown


def test_a_cache_that_is_set_is_kept(monkeypatch):
    set_to = jax.config.jax_compilation_cache_dir
    handler = absl_logging.get_absl_handler()
    monkeypatch.setattr(handler, "filters", [])
    verbosity = absl_logging.get_verbosity()
    startup.start()
    absl_logging.set_verbosity(verbosity)
    assert jax.config.jax_compilation_cache_dir == set_to


def test_words_that_belong_to_no_flag_are_refused():
    with pytest.raises(UserError, match="'false' belongs to no flag"):
        startup.start(["predict.py", "false"])
