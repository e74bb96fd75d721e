import contextlib
import json

import pytest

from swinsmt_jax.checks import UserError
from swinsmt_jax.runtime import record
from swinsmt_jax.training import logs
from swinsmt_jax.training import workdir as folders
from swinsmt_jax.training.workdir import open_workdir, recorded_config


def test_the_config_is_recorded_and_read_back(tmp_path, make_config):
    config = make_config()
    workdir = open_workdir(tmp_path / "new" / "run", config)
    assert recorded_config(workdir / "config.json") == config
    assert [p.name for p in workdir.iterdir()] == ["config.json"]


def test_another_config_is_refused_by_the_keys_that_differ(tmp_path, make_config):
    open_workdir(tmp_path, make_config())
    (tmp_path / "checkpoints" / "2").mkdir(parents=True)
    other = make_config(
        model={"feature_size": 24}, optimizer={"b1": 0.8}, training={"num_steps": 9}
    )
    words = (
        r"belongs to another config; these keys differ: model.feature_size: 12 -> 24; "
        r"optimizer.b1: 0.9 -> 0.8\. Choose another --workdir .* may change only "
        r"data\.augmentations"
    )
    with pytest.raises(UserError, match=words):
        open_workdir(tmp_path, other)


@pytest.mark.parametrize(
    ("group", "key", "value"),
    [
        ("optimizer", "warmup_steps", 1),
        ("optimizer", "freeze", ("stem",)),
        ("training", "loss", "tversky_ce"),
        ("training", "seed", 1),
        ("training", "ema_decay", 0.5),
        ("data", "hu_range", (-500.0, 500.0)),
        ("data", "fold", 1),
    ],
)
def test_what_may_not_change_midway_is_refused_by_name(
    tmp_path, make_config, group, key, value
):
    open_workdir(tmp_path, make_config())
    (tmp_path / "checkpoints" / "2").mkdir(parents=True)
    with pytest.raises(UserError, match=rf"these keys differ: {group}\.{key}: "):
        open_workdir(tmp_path, make_config(**{group: {key: value}}))


def test_without_checkpoints_any_config_takes_the_workdir(tmp_path, make_config):
    open_workdir(tmp_path, make_config(optimizer={"freeze": ("^typo/",)}))
    (tmp_path / "checkpoints" / "2.orbax-checkpoint-tmp").mkdir(parents=True)
    other = make_config(model={"feature_size": 24})
    open_workdir(tmp_path, other)
    assert recorded_config(tmp_path / "config.json") == other


def test_length_rhythm_mesh_and_place_may_change(tmp_path, make_config):
    open_workdir(tmp_path, make_config())
    (tmp_path / "checkpoints" / "2").mkdir(parents=True)
    other = make_config(
        training={"num_steps": 9, "eval_every": 3},
        mesh={"data": 2},
        data={"root": "elsewhere", "num_workers": 1, "num_threads": 7},
        model={"remat": ("stage1",)},
        inference={"window_batch": 4},
    )
    open_workdir(tmp_path, other)
    assert recorded_config(tmp_path / "config.json") == other


@pytest.mark.parametrize("text", ["{", "[]", '{"model": {}}', ""])
def test_a_damaged_config_is_told(tmp_path, make_config, text):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(UserError, match=r"config\.json is not the config of a run"):
        open_workdir(tmp_path, make_config())
    assert (tmp_path / "config.json").read_text() == text


def test_a_file_is_no_workdir(tmp_path, make_config):
    (tmp_path / "file").write_text("")
    words = "file cannot be written: .*, or choose another folder"
    with pytest.raises(UserError, match=words):
        open_workdir(tmp_path / "file", make_config())


def test_the_record_is_plain_json(tmp_path, make_config):
    open_workdir(tmp_path, make_config())
    values = json.loads((tmp_path / "config.json").read_text())
    assert values["model"]["name"] == "swin_smt"
    assert values["data"]["patch_shape"] == [32, 32, 32]


@pytest.mark.parametrize("name", ["checkpoints", "tensorboard", "profile", "damaged"])
def test_no_link_in_a_workdir_is_written_through(tmp_path, make_config, name):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / name).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(UserError, match=f"{name} is a link, and is not written"):
        open_workdir(tmp_path / "run", make_config())


@pytest.mark.parametrize("name", ["config.json", "run.json", "metrics.jsonl"])
def test_a_link_to_a_file_is_replaced(tmp_path, make_config, name):
    target = tmp_path / "target"
    target.write_text("precious")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / name).symlink_to(target)
    with contextlib.suppress(UserError), folders.locked(tmp_path / "run"):
        open_workdir(tmp_path / "run", make_config())
        record.add_start(tmp_path / "run", {})
        with logs.open_log(tmp_path / "run", start=0, stop=1):
            pass
    assert target.read_text() == "precious"


def test_what_a_killed_run_left_is_removed(tmp_path, make_config):
    (tmp_path / ".partial-config.json-abcdefgh").mkdir()
    open_workdir(tmp_path, make_config())
    assert [p.name for p in tmp_path.iterdir()] == ["config.json"]
