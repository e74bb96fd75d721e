import logging
import sys

import jax
import pytest
from absl import flags
from absl import logging as absl_logging

from swinsmt_jax.checks import UserError
from swinsmt_jax.commands import evaluate, predict, preprocess, train
from swinsmt_jax.config import from_config_dict
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
    with pytest.raises(UserError, match="'false' does not belong to a flag"):
        startup.start(["predict.py", "false"])


@pytest.mark.parametrize("command", [evaluate, predict, preprocess, train])
def test_a_bad_flag_is_bad_usage_in_every_command(capsys, command):
    values = flags.FlagValues()
    command.define_flags(values)
    with pytest.raises(SystemExit) as stop, startup.exit_on_user_error("x.py"):
        startup.parse(["x.py", "--nonsense=1"], values)
    assert stop.value.code == 2 and "nonsense" in capsys.readouterr().err


@pytest.mark.parametrize("command", [evaluate, predict])
def test_a_flag_by_its_earlier_name_is_read_and_told(command, caplog):
    values = flags.FlagValues()
    command.define_flags(values)
    given = [f"--{name}=x" for name in ("workdir", "input", "output") if name in values]
    startup.parse(["x.py", *given, "--accumulate=host"], values)
    assert values.accumulate_on == "host"
    assert "--accumulate is now --accumulate_on" in caplog.text


@pytest.mark.parametrize("flag", ["--colors", "--nocolors", "--colors=true"])
def test_a_switch_by_its_earlier_spelling_is_read(flag, caplog):
    values = flags.FlagValues()
    predict.define_flags(values)
    startup.parse(["x.py", "--workdir=x", "--input=x", "--output=x", flag], values)
    assert values.colours == (flag != "--nocolors")
    assert "colors is now --" in caplog.text


def test_words_and_flags_come_in_any_order():
    values = flags.FlagValues()
    evaluate.define_flags(values)
    line = ["evaluate.py", "--compare", "a", "b", "--split=val"]
    assert startup.parse(line, values) == ["evaluate.py", "b"]
    assert values.compare == ["a"] and values.split == "val"


@pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning")
@pytest.mark.parametrize("name", ["n_conv_per_stage", "n_conv_per_stage_decoder"])
def test_a_flag_gives_one_number_for_all_stages(monkeypatch, name):
    line = ["train.py", "--config=configs/nnunet_plain.py", f"--config.model.{name}=1"]
    monkeypatch.setattr(sys, "argv", line)
    values = flags.FlagValues()
    startup.define_config(values)
    startup.parse(line, values)
    model = from_config_dict(values.config).model
    assert set(getattr(model, name)) == {1}
    other = "n_conv_per_stage_decoder" if name == "n_conv_per_stage" else name[:16]
    assert set(getattr(model, other)) == {2}
