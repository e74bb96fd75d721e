import dataclasses
import json
import multiprocessing
import os
import re
import shutil
import signal

import jax
import numpy as np
import pytest

from swinsmt_jax.checks import UserError
from swinsmt_jax.evaluation import validation
from swinsmt_jax.runtime import signals
from swinsmt_jax.training import checkpoint, logs, loop, losses
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
    state = loop.train(config, workdir=tmp_path / "run", validate=validation.validate)
    assert int(state.step) == 40
    rows = {row["step"]: row for row in read_rows(tmp_path / "run" / "metrics.jsonl")}
    assert list(rows) == [8, 16, 20, 24, 32, 40]
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert len(lines) == len(rows) and all("loss" in line for line in lines)
    assert rows[40]["loss"] < rows[8]["loss"]
    assert rows[40]["patches_per_second"] > 0
    assert set(rows[20]) >= {"val_dice", "val_dice/organs", "learning_rate"}
    found, _, info = checkpoint.load_model(tmp_path / "run")
    seen = found.data.seen  # at spacings of their own
    assert seen.fingerprint and seen.least == seen.most == (3.0, 3.0, 3.0)
    assert seen.groups["organs"][0] == "spleen"
    (start,) = json.loads((tmp_path / "run" / "run.json").read_text())["starts"]
    assert start["trained_on"]["fingerprint"] == seen.fingerprint
    assert start["attention"] == {}  # this network has none
    data = dataclasses.replace(found.data, seen=config.data.seen)
    assert dataclasses.replace(found, data=data) == config
    assert info["metrics"]["val_dice"] > 0.5
    assert 0 <= rows[40]["input_wait"] <= 1 and rows[40]["tflops_per_second"] > 0
    best = max((20, 40), key=lambda step: rows[step]["val_dice"])
    assert info["step"] == best


def test_an_interrupted_run_ends_as_the_undisturbed_one(
    tmp_path, make_config, monkeypatch
):
    config = make_config(model={"dropout": 0.3}, training={"num_steps": 7})
    whole = loop.train(config, workdir=tmp_path / "whole")

    class KilledError(Exception):
        pass

    row = logs.Log.row

    def dies_after_5(log, step, values):
        row(log, step, values)
        if step == 5:
            raise KilledError

    with monkeypatch.context() as patch:
        patch.setattr(logs.Log, "row", dies_after_5)
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


def add_loss(monkeypatch, broken):
    """Add dice_ce, NaN where `broken(loss, labels)`, under the name "broken"."""

    class Broken(losses.Loss):
        def __call__(self, logits, labels, *annotated):
            loss = super().__call__(logits, labels, *annotated)
            return jax.numpy.where(broken(loss, labels), jax.numpy.nan, loss)

    monkeypatch.setitem(losses.LOSSES, "broken", Broken(losses.soft_dice))


def test_losses_that_are_not_finite_stop_the_run(
    tmp_path, make_config, monkeypatch, caplog
):
    add_loss(monkeypatch, lambda loss, labels: loss < 1.9)
    skipping = {"loss": "broken", "max_skipped": 3}
    config = make_config(
        training={"num_steps": 100, "checkpoint_every": 1, **skipping},
        optimizer={"learning_rate": 0.05},
    )
    words = r"step \d+, on crops of s\d, s\d: the loss is nan.*3 steps in a row"
    with pytest.raises(UserError, match=words) as error:
        loop.train(config, workdir=tmp_path / "run")
    assert re.search(r"left out .\d so far, 2 in a row", caplog.text)
    _, model, info = checkpoint.load_model(tmp_path / "run")
    assert np.isfinite(model.stem.kernel[...]).all()
    last_good = int(
        re.search(r"parameters are those after step (\d+)", str(error.value))[1]
    )
    assert last_good <= info["step"] <= last_good + 3


def test_the_last_good_state_is_saved_before_the_run_stops(
    tmp_path, make_config, monkeypatch
):
    add_loss(monkeypatch, lambda loss, labels: loss < 1.9)
    skipping = {"loss": "broken", "max_skipped": 3}
    config = make_config(
        training={"num_steps": 100, "checkpoint_every": 1000, **skipping},
        optimizer={"learning_rate": 0.05},
    )
    with pytest.raises(UserError, match="now saved as step") as error:
        loop.train(config, workdir=tmp_path / "run")
    step = int(re.search(r"now saved as step (\d+)", str(error.value))[1])
    assert f"--start_from={tmp_path / 'run'}" in str(error.value)
    _, model, info = checkpoint.load_model(tmp_path / "run")
    assert info["step"] == step and np.isfinite(model.stem.kernel[...]).all()


def test_a_single_bad_step_is_counted_and_passed(tmp_path, make_config, monkeypatch):
    # On one crop of one case, seen at some steps.
    add_loss(monkeypatch, lambda loss, labels: labels[0, 0, 0, 0] == 1)
    config = make_config(training={"num_steps": 12, "loss": "broken"})
    state = loop.train(config, workdir=tmp_path / "run")
    rows = read_rows(tmp_path / "run" / "metrics.jsonl")
    bad = [row["step"] for row in rows if row["loss"] is None]
    assert bad and len(bad) < 12 and rows[-1]["skipped"] == len(bad)
    assert int(state.skipped[0]) == len(bad) and int(state.step) == 12


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
def test_a_signal_saves_and_the_run_continues(
    tmp_path, make_config, monkeypatch, number
):
    config = make_config(training={"num_steps": 7, "checkpoint_every": 100})
    whole = loop.train(config, workdir=tmp_path / "whole")
    row = logs.Log.row

    def signals_after_3(log, step, values):
        row(log, step, values)
        if step == 3:
            os.kill(os.getpid(), number)

    with monkeypatch.context() as patch:
        patch.setattr(logs.Log, "row", signals_after_3)
        words = f"{number.name} received: stopped after step 4 of 7, which is saved"
        with pytest.raises(signals.Interrupted, match=words) as error:
            loop.train(config, workdir=tmp_path / "cut")
    assert error.value.status == (130 if number == signal.SIGINT else 75)
    assert list(by_step(tmp_path / "cut")) == [1, 2, 3, 4]
    mark = tmp_path / "cut" / "requeue"
    assert mark.exists() == (number != signal.SIGINT)
    assert_equal_states(whole, loop.train(config, workdir=tmp_path / "cut"))
    assert not mark.exists()
    assert by_step(tmp_path / "cut") == by_step(tmp_path / "whole")
    starts = record_file(tmp_path / "cut")
    assert [start["first_step"] for start in starts] == [1, 5]


def curve(workdir):
    """What is compared of the rows of two runs."""
    names = ("step", "loss", "val_dice")
    rows = read_rows(workdir / "metrics.jsonl")
    return [tuple(row.get(name) for name in names) for row in rows]


@pytest.mark.parametrize("at", ["in validation", "before validation", "in the last"])
def test_a_signal_does_not_wait_for_validation(tmp_path, make_config, monkeypatch, at):
    rhythm = {"eval_every": 0 if at == "in the last" else 2, "checkpoint_every": 100}
    config = make_config(training={"num_steps": 4, **rhythm})
    whole = loop.train(config, workdir=tmp_path / "whole", validate=validation.validate)
    row, validated = logs.Log.row, []

    def signals_before(log, step, values):
        row(log, step, values)
        if step == 1 and at == "before validation":
            os.kill(os.getpid(), signal.SIGTERM)

    def signals_within(predict, cases, **options):
        validated.append(len(cases))
        os.kill(os.getpid(), signal.SIGTERM)
        return validation.validate(predict, cases, **options)

    with monkeypatch.context() as patch:
        patch.setattr(logs.Log, "row", signals_before)
        step = 4 if at == "in the last" else 2
        with pytest.raises(signals.Interrupted, match=f"step {step} of 4, which is"):
            loop.train(config, workdir=tmp_path / "cut", validate=signals_within)
    assert len(validated) == (at != "before validation")
    assert checkpoint.load_model(tmp_path / "cut")[2] == {"step": step, "metrics": {}}
    again = loop.train(config, workdir=tmp_path / "cut", validate=validation.validate)
    assert_equal_states(whole, again)
    assert curve(tmp_path / "cut") == curve(tmp_path / "whole")
    found = [checkpoint.load_model(tmp_path / name)[2] for name in ("whole", "cut")]
    assert found[0] == found[1] and found[0]["metrics"]


def test_a_step_is_saved_before_it_is_validated(tmp_path, make_config):
    class KilledError(Exception):
        pass

    def killed(*_, **__):
        raise KilledError

    config = make_config(training={"num_steps": 2, "checkpoint_every": 100})
    with pytest.raises(KilledError):
        loop.train(config, workdir=tmp_path / "run", validate=killed)
    assert checkpoint.load_model(tmp_path / "run")[2]["step"] == 2
    loop.train(config, workdir=tmp_path / "run", validate=validation.validate)
    info = checkpoint.load_model(tmp_path / "run", step="best")[2]
    assert curve(tmp_path / "run")[-1][2] == info["metrics"]["val_dice"]


def test_a_signal_while_the_last_checkpoint_is_written_is_heard(
    tmp_path, make_config, monkeypatch
):
    wait, heard = checkpoint.Checkpoints.wait, []

    def signals_and_waits(self):
        if not heard:
            heard.append(True)
            os.kill(os.getpid(), signal.SIGTERM)
        wait(self)

    monkeypatch.setattr(checkpoint.Checkpoints, "wait", signals_and_waits)
    config = make_config(training={"num_steps": 2})
    state = loop.train(config, workdir=tmp_path / "run")
    assert heard and int(state.step) == 2
    assert checkpoint.load_model(tmp_path / "run")[2]["step"] == 2


def test_metrics_on_a_full_disk_end_the_run_with_its_checkpoint(
    tmp_path, make_config, monkeypatch
):
    row = logs.Log.row

    def fills_after_4(log, step, values):
        if step == 5:
            log._file = full
        row(log, step, values)

    with monkeypatch.context() as patch, open("/dev/full", "ab", 0) as full:
        patch.setattr(logs.Log, "row", fills_after_4)
        words = "metrics.jsonl cannot be written: No space left.*that of step 4, and"
        with pytest.raises(UserError, match=words):
            loop.train(make_config(), workdir=tmp_path / "run")
    assert int(loop.train(make_config(), workdir=tmp_path / "run").step) == 6


def record_file(workdir):
    return json.loads((workdir / "run.json").read_text())["starts"]


def test_a_case_lost_on_the_way_is_named_and_nothing_else_is(
    tmp_path, make_config, dataset, monkeypatch
):
    config = make_config(
        training={"num_steps": 30, "checkpoint_every": 100}, data={"cache": False}
    )
    row = logs.Log.row
    hidden = dataset / "s1" / "hidden"

    def loses_a_case_after_3(log, step, values):
        row(log, step, values)
        if step == 3:
            (dataset / "s1" / "ct.nii.gz").rename(hidden)

    with monkeypatch.context() as patch:
        patch.setattr(logs.Log, "row", loses_a_case_after_3)
        with pytest.raises(UserError, match=r"s1/ct.nii.gz.*The state after step \d+"):
            loop.train(config, workdir=tmp_path / "run")
    hidden.rename(dataset / "s1" / "ct.nii.gz")
    assert checkpoint.load_model(tmp_path / "run")[2]["step"] >= 3
    assert int(loop.train(config, workdir=tmp_path / "run").step) == 30


def test_a_new_run_starts_from_other_parameters(tmp_path, make_config, caplog):
    def change(model):
        model.stem.kernel[...] = jax.numpy.full_like(model.stem.kernel[...], 3.0)
        return "1 parameter loaded"

    def missing():
        raise AssertionError("a run that continues needs no other weights")

    config = make_config(
        training={"num_steps": 2, "ema_decay": 0.5}, optimizer={"freeze": ("^stem/",)}
    )
    with caplog.at_level("INFO", logger="absl"):
        state = loop.train(config, workdir=tmp_path / "run", start_from=lambda: change)
    assert (state.params["stem"]["kernel"] == 3).all()
    assert (state.ema_params["stem"]["kernel"] == 3).all()
    assert "1 parameter loaded" in caplog.text
    longer = dataclasses.replace(config.training, num_steps=3)
    longer = dataclasses.replace(config, training=longer)
    loop.train(longer, workdir=tmp_path / "run", start_from=missing)
    assert "--start_from is ignored" in caplog.text


@pytest.mark.slow
def test_a_run_of_eight_devices_continues_on_fewer(tmp_path, make_config):
    """From 4 x 2 devices to 2, 1 and 1 x 8: the losses stay the same to 1e-4."""

    def config(data, expert, steps=6):
        return make_config(
            model={"num_experts": 8},
            data={"batch_size": 8},
            mesh={"data": data, "expert": expert},
            training={"num_steps": steps, "checkpoint_every": 3},
        )

    loop.train(config(4, 2), workdir=tmp_path / "whole")
    wanted = np.array(list(by_step(tmp_path / "whole").values()))
    shutil.copytree(tmp_path / "whole", tmp_path / "half")
    shutil.rmtree(tmp_path / "half" / "checkpoints" / "6")
    for data, expert in ((2, 1), (1, 1), (1, 8)):
        workdir = tmp_path / f"{data} x {expert}"
        shutil.copytree(tmp_path / "half", workdir)
        state = loop.train(config(data, expert), workdir=workdir)
        assert state.params["stem"]["kernel"].sharding.num_devices == data * expert
        found = np.array(list(by_step(workdir).values()))
        np.testing.assert_allclose(found, wanted, rtol=1e-4)


def test_a_trace_is_written(tmp_path, make_config):
    loop.train(make_config(), workdir=tmp_path / "run", profile_steps=2)
    assert list((tmp_path / "run" / "profile").rglob("*.xplane.pb"))


def test_a_trace_longer_than_the_run_is_warned_of(tmp_path, make_config, caplog):
    loop.train(make_config(), workdir=tmp_path / "run", profile_steps=4)
    assert "more steps than the 3 that are left after the first 3" in caplog.text


@pytest.mark.slow
def test_a_run_whose_reader_is_killed_says_why(tmp_path, make_config, monkeypatch):
    row = logs.Log.row

    def kills_after_2(log, step, values):
        row(log, step, values)
        if step == 2:
            (worker,) = multiprocessing.active_children()
            os.kill(worker.pid, signal.SIGKILL)

    config = make_config(
        data={"num_workers": 1},
        training={"num_steps": 500, "checkpoint_every": 1000, "log_every": 1},
    )
    with monkeypatch.context() as patch:
        patch.setattr(logs.Log, "row", kills_after_2)
        words = "has died .*exit code -9.*num_workers.*The state after step .* is saved"
        with pytest.raises(UserError, match=words):
            loop.train(config, workdir=tmp_path / "run")
    assert checkpoint.load_model(tmp_path / "run")[2]["step"] >= 2
