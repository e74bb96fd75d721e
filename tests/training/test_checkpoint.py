import dataclasses
import gc
import json
import re
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from swinsmt_jax import sharding
from swinsmt_jax.checks import UserError
from swinsmt_jax.config import MeshConfig
from swinsmt_jax.training import checkpoint
from swinsmt_jax.training.checkpoint import load_model, open_checkpoints, origin_of
from swinsmt_jax.training.optimizer import make_optimizer, make_schedule
from swinsmt_jax.training.state import abstract_state, initialize

pytestmark = [
    pytest.mark.usefixtures("tiny"),
    # Orbax leaves its other reads to a closed event loop when the first one fails.
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]


@pytest.fixture(autouse=True)
def collected():
    """Let what Orbax leaves behind be found in the test that left it."""
    yield
    gc.collect()


def states(config, *, data=1, expert=1):
    """A fresh state of the tiny network on a mesh, and its shapes."""
    schedule = make_schedule(config.optimizer, num_steps=6)
    optimizer = make_optimizer(config.optimizer, schedule, network=config.model)
    mesh = sharding.make_mesh(MeshConfig(data, expert))
    _, abstract = abstract_state(config.model, optimizer, mesh=mesh)
    return initialize(config.model, optimizer, seed=0, abstract=abstract), abstract


def at(state, step):
    return dataclasses.replace(state, step=jnp.int32(step))


def write(workdir, config, dice):
    """Save the steps and validation Dice of a dictionary; return the last state."""
    state, abstract = states(config)
    with open_checkpoints(workdir) as checkpoints:
        for step, value in dice.items():
            state = at(state, step)
            checkpoints.save(state, origin=origin_of(config, data="abc"))
            if value is not None:
                checkpoints.score(step, value)
    return state


def restore(workdir, config, abstract, data="abc"):
    with open_checkpoints(workdir) as checkpoints:
        return checkpoints.restore_latest(abstract, origin=origin_of(config, data=data))


def folders(workdir):
    return sorted(int(p.name) for p in (workdir / "checkpoints").iterdir())


@pytest.mark.parametrize("data, expert", [(1, 1), (4, 2)])
def test_a_state_comes_back_bit_by_bit_on_any_mesh(tmp_path, make_config, data, expert):
    config = make_config()
    saved = write(tmp_path, config, {7: None})
    _, abstract = states(config, data=data, expert=expert)
    found = restore(tmp_path, config, abstract)
    assert jax.tree.structure(found) == jax.tree.structure(saved)
    jax.tree.map(np.testing.assert_array_equal, found, saved)
    same = jax.tree.map(lambda a, b: a.sharding == b.sharding, found, abstract)
    assert all(jax.tree.leaves(same)) and int(found.step) == 7


def test_nothing_to_restore_is_none(tmp_path, make_config):
    config = make_config()
    assert restore(tmp_path, config, states(config)[1]) is None


def test_the_latest_two_and_the_best_are_kept(tmp_path, make_config):
    dice = {1: 0.2, 2: 0.9, 3: None, 4: 0.5, 5: float("nan"), 6: None}
    write(tmp_path, make_config(), dice)
    assert folders(tmp_path) == [2, 5, 6]
    for step, wanted in ((None, 2), ("best", 2), ("latest", 6), (5, 5)):
        assert load_model(tmp_path, step=step)[2]["step"] == wanted
    assert load_model(tmp_path)[2]["metrics"] == {"val_dice": 0.9}


def test_load_model_returns_the_network_and_its_config(tmp_path, make_config):
    config = make_config()
    state = write(tmp_path, config, {3: None})
    found, model, info = load_model(tmp_path)
    assert found == config and info == {"step": 3, "metrics": {}}
    np.testing.assert_array_equal(
        model.stem.kernel[...], state.params["stem"]["kernel"]
    )
    assert model(jnp.ones((1, 2, 2, 2, 1))).shape == (1, 2, 2, 2, 4)


def test_a_loaded_network_runs_on_any_device(tmp_path, make_config):
    write(tmp_path, make_config(), {3: None})
    model = load_model(tmp_path)[1]
    mesh = sharding.make_mesh(MeshConfig(4, 1))
    x = jax.device_put(jnp.ones((4, 2, 2, 2, 1)), sharding.batch_sharding(mesh))
    assert jax.jit(lambda m, x: m(x))(model, x).sharding.num_devices == 4


def test_load_model_says_what_is_missing(tmp_path, make_config):
    with pytest.raises(UserError, match=r"holds no complete.*python train\.py"):
        load_model(tmp_path)
    (tmp_path / "checkpoints").mkdir()
    with pytest.raises(UserError, match="holds no complete checkpoint"):
        load_model(tmp_path)
    write(tmp_path, make_config(), {3: None})
    with pytest.raises(UserError, match="no checkpoint of step 9; there are 3"):
        load_model(tmp_path, step=9)
    with pytest.raises(UserError, match="no best checkpoint.*--step=latest"):
        load_model(tmp_path, step="best")


def test_a_checkpoint_of_another_model_is_refused(tmp_path, make_config):
    write(tmp_path, make_config(), {3: None})
    other = make_config(model={"feature_size": 24})
    words = (
        r"of another model; 5 .*differ: blocks/0/kernel: \(12, 4\) in the checkpoint"
    )
    with pytest.raises(UserError, match=words):
        restore(tmp_path, other, states(other)[1])


def test_load_model_refuses_parameters_of_another_model(tmp_path, make_config):
    write(tmp_path, make_config(), {3: None})
    meta = tmp_path / "checkpoints/3/meta/metadata"
    content = json.loads(meta.read_text())
    content["config"]["model"]["out_channels"] = 9
    meta.write_text(json.dumps(content))
    with pytest.raises(UserError, match=r"blocks/0/bias: \(4,\) .*, \(9,\) in the net"):
        load_model(tmp_path)


@pytest.mark.parametrize(
    "changes, data, words",
    [
        ({"training": {"seed": 1}}, "abc", "its seed is 0, but now 1"),
        ({}, "abd", "its data is 'abc', but now 'abd' .*cases of the train split"),
    ],
)
def test_a_run_that_would_not_repeat_itself_is_refused(
    tmp_path, make_config, changes, data, words
):
    write(tmp_path, make_config(), {3: None})
    config = make_config(**changes)
    with pytest.raises(UserError, match=words):
        restore(tmp_path, config, states(config)[1], data=data)


def truncate(folder):
    for part in (folder / "state").rglob("d/*"):
        part.write_bytes(part.read_bytes()[:9])


def biggest(folder):
    return max((folder / "state").rglob("d/*"), key=lambda p: p.stat().st_size)


def halve(folder):
    path = biggest(folder)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


@pytest.mark.parametrize(
    "damage",
    [
        truncate,
        lambda folder: shutil.rmtree(folder / "state"),
        lambda folder: shutil.rmtree(folder / "meta"),
        lambda folder: (folder / "state" / "_METADATA").unlink(),
        lambda folder: (folder / "meta" / "metadata").write_text('{"config'),
        lambda folder: (folder / "meta" / "metadata").write_text("[]"),
        halve,
        lambda folder: biggest(folder).unlink(),
        lambda folder: (folder / "metrics" / "metrics").write_text('{"val'),
        lambda folder: (folder / "metrics" / "metrics").write_text(""),
        lambda folder: (folder / "metrics" / "metrics").write_text('{"x": 1}'),
    ],
    ids=[
        *("truncated", "no state", "no meta", "no structure", "half a meta"),
        *("a list as meta", "biggest file halved", "one data file gone"),
        *("metrics cut", "metrics empty", "metrics of another name"),
    ],
)
def test_damage_falls_back_to_the_checkpoint_before(
    tmp_path, make_config, damage, caplog
):
    config = make_config()
    write(tmp_path, config, {3: 0.1, 4: 0.2})
    damage(tmp_path / "checkpoints" / "4")
    words = "checkpoints/4 cannot be read; it is damaged"
    with pytest.raises(UserError, match=words):
        load_model(tmp_path, step=4)
    for step in (None, "best", "latest"):
        assert load_model(tmp_path, step=step)[2]["step"] == 3
        assert re.search(words, caplog.text)
        caplog.clear()
    assert int(restore(tmp_path, config, states(config)[1]).step) == 3
    assert re.search(f"{words}.*it was moved to {tmp_path}/damaged/4", caplog.text)
    assert folders(tmp_path) == [3] and (tmp_path / "damaged" / "4").is_dir()
    write(tmp_path, config, {4: None})  # its number is free again
    assert int(restore(tmp_path, config, states(config)[1]).step) == 4


def test_every_flipped_bit_of_parameters_is_noticed(tmp_path, make_config, rng):
    config = make_config()
    state = write(tmp_path, config, {4: None})
    abstract = states(config)[1]
    file = biggest(tmp_path / "checkpoints/4")
    content, noticed = file.read_bytes(), 0
    for place in rng.integers(len(content), size=12):
        flipped = bytearray(content)
        flipped[place] ^= 1 << int(rng.integers(8))
        file.write_bytes(flipped)
        try:
            found = load_model(tmp_path, step=4)[1].stem.kernel[...]
            np.testing.assert_array_equal(found, state.params["stem"]["kernel"])
        except UserError as error:
            noticed += "it is damaged" in str(error)
    assert noticed
    file.write_bytes(content)
    assert int(restore(tmp_path, config, abstract).step) == 4


@pytest.mark.parametrize("expert", [1, 2])
@pytest.mark.parametrize("field", ["params", "opt_state"])
def test_an_array_that_is_not_what_was_saved_is_damage(
    tmp_path, make_config, field, expert
):
    config = make_config()
    write(tmp_path, config, {3: None, 4: None})
    file = tmp_path / "checkpoints/4/meta/metadata"
    meta = json.loads(file.read_text())
    names = [name for name in meta["checksums"] if name.startswith(field)]
    rows = [name for name in names if "/experts/" in name and name.endswith("[1]")]
    assert rows, names
    meta["checksums"][rows[0]] ^= 1
    file.write_text(json.dumps(meta))
    _, abstract = states(config, data=2, expert=expert)
    assert int(restore(tmp_path, config, abstract).step) == 3


def test_checkpoints_of_earlier_versions_have_no_checksums(tmp_path, make_config):
    config = make_config()
    write(tmp_path, config, {4: None})
    file = tmp_path / "checkpoints/4/meta/metadata"
    meta = json.loads(file.read_text())
    del meta["checksums"]
    file.write_text(json.dumps(meta))
    assert int(restore(tmp_path, config, states(config)[1]).step) == 4
    assert load_model(tmp_path)[2]["step"] == 4


def test_what_the_system_refuses_to_read_now_stays_where_it_is(tmp_path, make_config):
    config = make_config()
    write(tmp_path, config, {3: 0.1, 4: 0.2})
    for part in ("meta/metadata", "metrics/metrics"):
        file = tmp_path / "checkpoints" / "4" / part
        whole = file.read_text()
        file.unlink()
        file.symlink_to("/proc/self/mem")  # EIO for its first bytes
        for read in (
            lambda: restore(tmp_path, config, states(config)[1]),
            lambda: load_model(tmp_path),
        ):
            with pytest.raises(UserError, match="cannot be read now .*Errno 5"):
                read()
        assert folders(tmp_path) == [3, 4] and not (tmp_path / "damaged").exists()
        file.unlink()
        file.write_text(whole)
    assert int(restore(tmp_path, config, states(config)[1]).step) == 4


def test_what_one_process_finds_damaged_all_leave(tmp_path, make_config, monkeypatch):
    config = make_config()
    write(tmp_path, config, {3: None, 4: None})
    others = ["checkpoints/4 cannot be read by process 1"]

    def gather(value):
        damage_is_asked_for = value is None and others
        return [value, others.pop()] if damage_is_asked_for else [value]

    monkeypatch.setattr(checkpoint.processes, "gather", gather)
    assert int(restore(tmp_path, config, states(config)[1]).step) == 3
    assert folders(tmp_path) == [3] and (tmp_path / "damaged" / "4").is_dir()


def test_a_checkpoint_that_a_training_drops_meanwhile_is_not_damaged(
    tmp_path, make_config, monkeypatch, caplog
):
    config = make_config()
    write(tmp_path, config, {3: None, 4: None})
    load, loaded = checkpoint._load, []

    def drop(folder):
        loaded.append(folder.name)
        if folder.name == "4":  # as it is read, 5 has become complete
            folder.rename(tmp_path / "checkpoints" / "5")
        return load(folder)

    monkeypatch.setattr(checkpoint, "_load", drop)
    shutil.rmtree(tmp_path / "checkpoints" / "3")
    assert checkpoint.load_model(tmp_path)[2]["step"] == 5
    assert loaded == ["4", "5"] and "damaged" not in caplog.text


def test_a_device_out_of_memory_is_no_damage(tmp_path, make_config, monkeypatch):
    config = make_config()
    write(tmp_path, config, {3: None})

    def full(*_, **__):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory")

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint.ocp.StandardCheckpointHandler, "restore", full)
        with pytest.raises(jax.errors.JaxRuntimeError):
            restore(tmp_path, config, states(config)[1])
    assert folders(tmp_path) == [3]


def test_no_readable_checkpoint_is_an_error(tmp_path, make_config):
    config = make_config()
    write(tmp_path, config, {3: None})
    shutil.rmtree(tmp_path / "checkpoints" / "3" / "state")
    with pytest.raises(UserError, match="none of the checkpoints could be read"):
        restore(tmp_path, config, states(config)[1])
    assert (tmp_path / "damaged" / "3").is_dir()


def test_the_average_is_what_is_evaluated(tmp_path, make_config):
    config = make_config(training={"ema_decay": 0.5})
    _, abstract = states(config)
    state = dataclasses.replace(
        states(config)[0],
        step=jnp.int32(1),
        ema_params=jax.tree.map(
            lambda leaf: jnp.full(leaf.shape, 7.0), abstract.params
        ),
    )
    with open_checkpoints(tmp_path) as checkpoints:
        checkpoints.save(state, origin=origin_of(config, data="abc"))
    _, model, _ = load_model(tmp_path)
    assert (model.stem.kernel[...] == 7).all()


def test_an_unfinished_checkpoint_is_passed_over(tmp_path, make_config):
    config = make_config()
    write(tmp_path, config, {3: None})
    done = tmp_path / "checkpoints" / "3"
    shutil.copytree(done, done.with_name("4.orbax-checkpoint-tmp"))
    assert int(restore(tmp_path, config, states(config)[1]).step) == 3
    assert folders(tmp_path) == [3]


def test_the_config_is_read_from_the_checkpoint(tmp_path, make_config):
    config = make_config()
    longer = dataclasses.replace(config.training, num_steps=99)
    write(tmp_path, dataclasses.replace(config, training=longer), {3: None})
    assert load_model(tmp_path)[0].training.num_steps == 99


def test_parameters_that_are_not_finite_are_refused(tmp_path, make_config):
    config = make_config()
    state, _ = states(config)
    params = dict(state.params)
    params["stem"] = jax.tree.map(lambda x: x.at[0].set(jnp.inf), params["stem"])
    with open_checkpoints(tmp_path) as checkpoints:
        state = dataclasses.replace(at(state, 4), params=params)
        checkpoints.save(state, origin=origin_of(config, data="abc"))
    with pytest.raises(UserError, match="checkpoints/4 has .* infinite, such as stem"):
        load_model(tmp_path)


def test_reading_a_checkpoint_warns_of_nothing(tmp_path, make_config, caplog):
    config = make_config()
    write(tmp_path, config, {1: None})
    load_model(tmp_path)
    restore(tmp_path, config, states(config)[1])
    assert "etadata file" not in caplog.text
    assert [r for r in caplog.records if r.levelname != "INFO"] == []
