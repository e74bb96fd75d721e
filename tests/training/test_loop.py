import dataclasses

import jax
import numpy as np
import pytest

from swinsmt_jax import losses
from swinsmt_jax.checks import UserError
from swinsmt_jax.evaluation import run
from swinsmt_jax.training import checkpoint, loop
from swinsmt_jax.training.logs import read_rows

pytestmark = pytest.mark.usefixtures("tiny", "dataset")


def by_step(workdir):
    """Loss and gradient norm of each step in metrics.jsonl."""
    rows = read_rows(workdir / "metrics.jsonl")
    assert [row["step"] for row in rows] == sorted({row["step"] for row in rows})
    return {row["step"]: (row["loss"], row["grad_norm"]) for row in rows}


def assert_equal_states(one, other):
    jax.tree.map(np.testing.assert_array_equal, one, other)


def test_a_run_learns_validates_and_keeps_its_best(tmp_path, make_config):
    config = make_config(
        training={"num_steps": 40, "eval_every": 20, "log_every": 8},
        optimizer={"learning_rate": 0.05},
    )
    state = loop.train(config, workdir=tmp_path / "run", validate=run.validate)
    assert int(state.step) == 40
    rows = {row["step"]: row for row in read_rows(tmp_path / "run" / "metrics.jsonl")}
    assert list(rows) == [8, 16, 20, 24, 32, 40]
    assert rows[40]["loss"] < rows[8]["loss"]
    assert rows[40]["patches_per_second"] > 0
    assert set(rows[20]) >= {"val_dice", "val_dice/organs", "learning_rate"}
    found, _, info = checkpoint.load_model(tmp_path / "run")
    assert found == config and info["metrics"]["val_dice"] > 0.5
    best = max((20, 40), key=lambda step: rows[step]["val_dice"])
    assert info["step"] == best


def test_an_interrupted_run_ends_as_the_undisturbed_one(
    tmp_path, make_config, monkeypatch
):
    config = make_config(model={"dropout": 0.3}, training={"num_steps": 7})
    whole = loop.train(config, workdir=tmp_path / "whole")

    class KilledError(Exception):
        pass

    record = loop._record

    def dies_after_5(log, step, *rest):
        record(log, step, *rest)
        if step == 5:
            raise KilledError

    with monkeypatch.context() as patch:
        patch.setattr(loop, "_record", dies_after_5)
        with pytest.raises(KilledError):
            loop.train(config, workdir=tmp_path / "cut")
    assert list(by_step(tmp_path / "cut")) == [1, 2, 3, 4, 5]  # checkpoint: step 4
    resumed = loop.train(config, workdir=tmp_path / "cut")
    assert_equal_states(whole, resumed)
    assert by_step(tmp_path / "cut") == by_step(tmp_path / "whole")


def test_a_run_continues_on_another_mesh(tmp_path, make_config):
    config = make_config(data={"batch_size": 4}, training={"num_steps": 4})
    one = loop.train(config, workdir=tmp_path / "one")
    half = dataclasses.replace(config.training, num_steps=2)
    sizes = dataclasses.replace(config.mesh, data=2, expert=2)
    first = make_config(
        data={"batch_size": 4},
        training={"num_steps": 4},
        mesh={"data": 2, "expert": 2},
    )
    stop_at_2 = dataclasses.replace(first, training=half, mesh=sizes)
    loop.train(stop_at_2, workdir=tmp_path / "two")
    last = loop.train(config, workdir=tmp_path / "two")
    assert int(last.step) == 4 and last.step.sharding.num_devices == 1
    losses = [list(by_step(tmp_path / name)) for name in ("one", "two")]
    assert losses[0] == losses[1] == [1, 2, 3, 4]
    assert int(one.step) == 4


def test_a_finished_run_is_left_alone(tmp_path, make_config):
    config = make_config(training={"num_steps": 2})
    done = loop.train(config, workdir=tmp_path / "run")
    rows = (tmp_path / "run" / "metrics.jsonl").read_text()
    assert_equal_states(done, loop.train(config, workdir=tmp_path / "run"))
    assert (tmp_path / "run" / "metrics.jsonl").read_text() == rows


def test_the_result_does_not_depend_on_rhythm(tmp_path, make_config):
    often = make_config()
    rarely = make_config(training={"log_every": 5, "checkpoint_every": 100})
    states = [
        loop.train(config, workdir=tmp_path / name)
        for name, config in (("often", often), ("rarely", rarely))
    ]
    assert_equal_states(*states)


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path, make_config, monkeypatch):
    def breaks(logits, labels):
        loss = losses._loss(logits, labels.astype("int32"))
        return jax.numpy.where(loss < 1.9, jax.numpy.nan, loss)

    monkeypatch.setattr(losses, "dice_cross_entropy", breaks)
    config = make_config(
        training={"num_steps": 100, "checkpoint_every": 1},
        optimizer={"learning_rate": 0.05},
    )
    with pytest.raises(UserError, match=r"step \d+, on crops of s\d, s\d: the loss is"):
        loop.train(config, workdir=tmp_path / "run")
    _, model, info = checkpoint.load_model(tmp_path / "run")
    assert info["step"] == max(by_step(tmp_path / "run"))
    assert np.isfinite(model.stem.kernel[...]).all()


def test_labels_beyond_the_network_are_refused(tmp_path, make_config):
    config = make_config(model={"out_channels": 3})
    with pytest.raises(
        UserError, match=r"case 's\d' holds label 3, .*out_channels is 3"
    ):
        loop.train(config, workdir=tmp_path / "run")


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"mesh": {"data": 16}}, "16 devices, but there are 8"),
        ({"mesh": {"data": 4}}, "batch_size is 2, but must be a multiple of the 4"),
        ({"model": {"in_channels": 2}}, "a CT has 1 channel"),
        ({"data": {"root": "nowhere"}}, "nowhere does not exist"),
    ],
)
def test_impossible_runs_leave_nothing_behind(tmp_path, make_config, changes, words):
    with pytest.raises(UserError, match=words):
        loop.train(make_config(**changes), workdir=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_validation_needs_cases(tmp_path, make_config, dataset):
    meta = dataset / "meta.csv"
    meta.write_text(meta.read_text().replace(";val", ";test"))
    with pytest.raises(UserError, match="no case of the split 'val'"):
        loop.train(make_config(), workdir=tmp_path / "run", validate=run.validate)


def test_data_that_changed_is_refused(tmp_path, make_config, dataset):
    config = make_config(training={"num_steps": 2})
    loop.train(config, workdir=tmp_path / "run")
    meta = dataset / "meta.csv"
    meta.write_text(meta.read_text().replace("s2;train", "s2;test"))
    longer = make_config(training={"num_steps": 4})
    with pytest.raises(UserError, match="cannot be continued: its data is"):
        loop.train(longer, workdir=tmp_path / "run")
