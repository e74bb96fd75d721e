"""What `loop.train` refuses, and what it leaves behind then."""

import shutil
from unittest import mock

import jax
import jax.numpy as jnp
import pytest

from swinsmt_jax import SwinSMTConfig
from swinsmt_jax.checks import UserError
from swinsmt_jax.data import preprocess
from swinsmt_jax.evaluation import validation
from swinsmt_jax.runtime import cost, processes
from swinsmt_jax.training import loop, setup
from swinsmt_jax.training import workdir as workdir_module
from swinsmt_jax.training.checkpoint import load_model

pytestmark = pytest.mark.usefixtures("tiny", "dataset")


def test_a_workdir_in_use_is_refused(tmp_path, make_config):
    config = make_config(training={"num_steps": 1})
    with (
        workdir_module.locked(tmp_path / "run"),
        pytest.raises(UserError, match=r"in use by a live run .process \d+ on"),
    ):
        loop.train(config, workdir=tmp_path / "run")
    loop.train(config, workdir=tmp_path / "run")


def test_training_in_64_bits_is_refused(tmp_path, make_config):
    with (
        jax.enable_x64(True),
        pytest.raises(UserError, match="JAX_ENABLE_X64 is set.*unset it"),
    ):
        loop.train(make_config(), workdir=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_path_whose_checkpoints_cannot_be_read_is_refused_before_step_1(
    tmp_path, make_config
):
    config = make_config(training={"num_steps": 2})
    loop.train(config, workdir=tmp_path / "run")
    moved = tmp_path / "[lr=1e-2] a"
    shutil.copytree(tmp_path / "run", moved)
    longer = make_config(training={"num_steps": 4})
    for workdir in (moved, tmp_path / "[seeds]" / "b", tmp_path / "a\\b"):
        with pytest.raises(UserError, match="cannot be read back.*are a pattern"):
            loop.train(longer, workdir=workdir)
        assert not (workdir / "damaged").exists()
        assert not list((workdir / "checkpoints").glob(".*"))
    kept = sorted(p.name for p in (moved / "checkpoints").iterdir())
    assert kept == sorted(p.name for p in (tmp_path / "run/checkpoints").iterdir())


def test_a_step_beyond_the_memory_is_refused_with_remedies(
    tmp_path, make_config, monkeypatch
):
    monkeypatch.setattr(cost, "device_memory", lambda mesh: 100_000)
    words = (
        "needs .* GB on each device .*has 0.00 GB. What helps: "
        "--config.training.accumulate=2, or --config.model.remat=.*, or "
        "--config.data.batch_size=1. Another .*new --workdir: .*more devices"
    )
    config = make_config()
    with pytest.raises(UserError, match=words):
        loop.train(config, workdir=tmp_path / "run")
    in_force = make_config(
        model={"remat": SwinSMTConfig.remat_parts, "dtype": "bfloat16"},
        data={"batch_size": 1},
    )
    with pytest.raises(UserError, match="What helps: more devices") as error:
        loop.train(in_force, workdir=tmp_path / "run")
    assert "--config" not in str(error.value)


def full(*_, **__):
    jax.block_until_ready(jax.jit(jnp.ones, static_argnums=0)((1 << 44,)))


class FullWhenCalled:
    """A compiled step for whose arguments there is room, but not for its work."""

    __call__ = full

    def memory_analysis(self):
        return mock.Mock(argument_size_in_bytes=1, temp_size_in_bytes=1)


@pytest.mark.parametrize(
    "module, name, replacement",
    [
        (setup, "initialize", full),
        (processes, "compiled", full),
        (processes, "compiled", lambda *_: FullWhenCalled()),
    ],
    ids=["state", "compilation", "step"],
)
def test_a_device_that_runs_out_of_memory_is_told_with_remedies(
    tmp_path, make_config, monkeypatch, module, name, replacement
):
    monkeypatch.setattr(module, name, replacement)
    words = (
        "run out of memory .*RESOURCE_EX.*What helps: --config.training.accumulate=2"
    )
    with pytest.raises(UserError, match=words):
        loop.train(make_config(), workdir=tmp_path / "run")


def test_a_start_that_failed_does_not_claim_the_workdir(
    tmp_path, make_config, monkeypatch
):
    with pytest.raises(UserError, match="'\\^stm/', which matches no parameter"):
        loop.train(
            make_config(optimizer={"freeze": ("^stm/",)}), workdir=tmp_path / "run"
        )
    with monkeypatch.context() as patch:
        patch.setattr(cost, "device_memory", lambda mesh: 10_000)
        with pytest.raises(UserError, match="has 0.00 GB"):
            loop.train(make_config(), workdir=tmp_path / "run")
    smaller = make_config(data={"batch_size": 1}, training={"num_steps": 1})
    assert int(loop.train(smaller, workdir=tmp_path / "run").step) == 1
    other = make_config(training={"num_steps": 1, "seed": 1})
    with pytest.raises(UserError, match="another config.*training.seed: 0 -> 1"):
        loop.train(other, workdir=tmp_path / "run")


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
        ({"data": {"root": "nowhere"}}, "nowhere does not exist"),
        (
            {"mesh": {"data": 2}, "training": {"accumulate": 2}},
            r"must divide the 1 samples .*: take one of 1\.",
        ),
    ],
)
def test_impossible_runs_leave_nothing_behind(tmp_path, make_config, changes, words):
    with pytest.raises(UserError, match=words):
        loop.train(make_config(**changes), workdir=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_without_validation_cases_nothing_is_validated(
    tmp_path, make_config, dataset, caplog
):
    meta = dataset / "meta.csv"
    meta.write_text(meta.read_text().replace(";val", ";test"))
    config = make_config(training={"num_steps": 1})
    loop.train(config, workdir=tmp_path / "run", validate=validation.validate)
    assert "no case of the split 'val'" in caplog.text
    assert "Nothing is validated" in caplog.text
    assert load_model(tmp_path / "run")[2] == {"step": 1, "metrics": {}}


def test_data_that_changed_is_refused(tmp_path, make_config, dataset):
    config = make_config(training={"num_steps": 2})
    loop.train(config, workdir=tmp_path / "run")
    meta = dataset / "meta.csv"
    meta.write_text(meta.read_text().replace("s2;train", "s2;test"))
    longer = make_config(training={"num_steps": 4})
    with pytest.raises(UserError, match="cannot be continued: its data is"):
        loop.train(longer, workdir=tmp_path / "run")


def test_a_workdir_that_cannot_be_written_is_refused(tmp_path, make_config):
    (tmp_path / "file").write_text("")
    words = "file/run cannot be written: Not a dir.*another folder"
    with pytest.raises(UserError, match=words):
        loop.train(make_config(), workdir=tmp_path / "file" / "run")


def test_a_case_that_a_store_lost_is_refused(tmp_path, make_config, dataset):
    preprocess.preprocess(dataset, tmp_path / "store")
    config = make_config(data={"root": str(tmp_path / "store")})
    shutil.rmtree(tmp_path / "store" / "s1")
    with pytest.raises(
        UserError, match="lacks 1 cases .*such as s1.*Run preprocess.py"
    ):
        loop.train(config, workdir=tmp_path / "run")
    assert not (tmp_path / "run").exists()
