"""Text from files of others: names, messages and JSON."""

import json

import pytest

from swinsmt_jax import checks, class_map, labels
from swinsmt_jax.data import dataset, store
from swinsmt_jax.evaluation import compare
from swinsmt_jax.inference import shared
from swinsmt_jax.runtime import record, startup
from swinsmt_jax.training import logs, workdir


def test_no_terminal_obeys_what_a_message_quotes():
    error = checks.UserError("case 'a\x1b[2Jb\x07\u202e' is bad\nsee é, 肝")
    assert str(error) == "case 'a\\x1b[2Jb\\x07\\u202e' is bad\\nsee é, 肝"


@pytest.mark.parametrize("name", ["overall", "", " organs", "a\x1b", "a\nb", 3])
def test_a_group_cannot_be_called_what_is_not_a_column_of_its_own(name, tmp_path):
    with pytest.raises(checks.UserError, match="is not a name for a group"):
        class_map.make(["liver"], {name: ["liver"]}, where="dataset.json")
    if isinstance(name, str):
        (tmp_path / "groups.json").write_text(json.dumps({name: ["liver"]}))
        with pytest.raises(checks.UserError, match="is not a name for a group"):
            labels.load_groups(tmp_path / "groups.json")


UNREADABLE = [b"[" * 100_000, b'{"a": "\xff\xfe"}', b"{", b"\0" * 99]


@pytest.mark.parametrize("content", UNREADABLE)
@pytest.mark.parametrize(
    "name, read",
    [
        ("groups.json", labels.load_groups),
        ("dataset.json", lambda file: dataset.open_dataset(file.parent)),
        ("config.json", workdir.recorded_config),
        ("run.json", record.read),
        ("store.json", lambda file: store.read_options(file.parent)),
        ("results.json", lambda file: compare.compare(file, file, split="test")),
        ("config.json", lambda file: startup._config_of(str(file), None)),
    ],
)
def test_json_that_is_none_is_refused_in_one_line(tmp_path, name, read, content):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(checks.UserError) as told:
        read(tmp_path / name)
    assert name in str(told.value) and len(str(told.value).splitlines()) == 1


@pytest.mark.parametrize("content", UNREADABLE)
def test_json_that_can_be_made_anew_is_passed_over(tmp_path, content):
    (tmp_path / "summary.json").write_bytes(content)
    assert shared.read(tmp_path) == {}
    (tmp_path / "metrics.jsonl").write_bytes(b'{"step": 1}\n' + content + b"\n[1]\n")
    assert logs.read_rows(tmp_path / "metrics.jsonl") == [{"step": 1}]
