"""model.remat="auto": the least recomputation that fits, predicted and compiled."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import pytest

from benchmarks import programs
from swinsmt_jax import sharding
from swinsmt_jax.checks import UserError
from swinsmt_jax.config import from_config_dict
from swinsmt_jax.configs import swin_smt_paper
from swinsmt_jax.models.registry import AUTO
from swinsmt_jax.ops import by_platform
from swinsmt_jax.runtime import cost
from swinsmt_jax.training import loop, losses, remat, setup


@pytest.fixture
def compile_step(make_config, monkeypatch):
    """Choose and compile the step of the tiny network for a device of a size."""

    def call(limit):
        monkeypatch.setattr(cost, "device_memory", lambda mesh: limit)
        config = make_config(model={"remat": "auto"})
        mesh = sharding.make_mesh(config.mesh)
        abstract, _, step_of, _ = setup.make_network(
            config.model, config.optimizer, config.training, mesh=mesh
        )
        place, shape = sharding.batch_sharding(mesh), (2, *config.data.patch_shape)
        batch = {
            "image": jax.ShapeDtypeStruct((*shape, 1), jnp.float32, sharding=place),
            "label": jax.ShapeDtypeStruct(shape, jnp.uint8, sharding=place),
        }
        return remat.compile_step(
            *(step_of, abstract, batch),
            model=config.model,
            data=config.data,
            loss=losses.make("dice_ce"),
            accumulate=1,
            deterministic=False,
            mesh=mesh,
        )

    return call


@pytest.mark.slow
def test_nothing_is_recomputed_where_all_fits(compile_step):
    _, found, choice = compile_step(10**12)
    assert choice.parts == ()
    assert choice.compiled == found.needed
    assert 0.8 < choice.predicted / choice.compiled < 1.5


@pytest.mark.slow
@pytest.mark.parametrize("limit", [1000, None])
def test_all_is_recomputed_where_nothing_fits_or_the_memory_is_unknown(
    compile_step, make_config, limit
):
    _, found, choice = compile_step(limit)
    assert choice.parts == make_config().model.remat_parts
    assert found.fits == (limit is None)
    assert 0.8 < choice.predicted / choice.compiled < 1.8


@pytest.mark.slow
def test_the_compiler_has_the_last_word(compile_step, monkeypatch):
    monkeypatch.setattr(remat, "AT_WORK", 0.0)
    monkeypatch.setattr(remat, "SHARE", 1.0)
    _, _, most = compile_step(10**12)
    between = (most.predicted + most.compiled) // 2
    assert most.predicted < between < most.compiled, "the prediction is too low"
    _, found, choice = compile_step(between)
    assert choice.parts
    assert found.fits and choice.compiled <= between


@pytest.mark.usefixtures("dataset")
def test_a_run_says_what_was_chosen(make_config, tmp_path, caplog):
    config = make_config(
        model={"remat": "auto"}, data={"batch_size": 1}, training={"num_steps": 1}
    )
    assert config.model.remat == AUTO
    with caplog.at_level("INFO", logger="absl"):
        loop.train(config, workdir=tmp_path / "auto")
    assert "remat: nothing is recomputed in the backward pass" in caplog.text
    (start,) = json.loads((tmp_path / "auto/run.json").read_text())["starts"]
    assert start["remat"]["parts"] == []


def abstract_step(config):
    """The training step of a config, and shapes of its state and of one patch."""
    mesh = sharding.make_mesh(config.mesh, devices=jax.devices()[:1])
    abstract, _, step_of, _ = setup.make_network(
        config.model, config.optimizer, config.training, mesh=mesh
    )
    batch = programs.abstract_batch((1, *config.data.patch_shape), mesh)
    return step_of(config.model), abstract, batch


def test_a_card_of_40_gb_recomputes_nothing_of_the_papers_step():
    config = from_config_dict(swin_smt_paper.get_config())
    assert config.model.remat == AUTO
    _, *shapes = abstract_step(config)
    predict = remat.predictor(config.model, *shapes, loss=losses.make("dice_ce"))
    nothing = dataclasses.replace(config.model, remat=())
    assert 5e9 < predict(nothing) < remat.SHARE * 40e9


@pytest.mark.parametrize("deterministic, how", [(False, "xla"), (True, "in blocks")])
def test_a_prediction_has_the_attention_of_the_step(make_config, deterministic, how):
    config = make_config(
        model={"dtype": "bfloat16", "feature_size": 24, "routing": "cudnn"},
        training={"deterministic": deterministic},
    )
    step, *shapes = abstract_step(config)
    with by_platform.fused_attention("xla"):
        with by_platform.noting() as of_step:
            step.trace(*shapes)
        with by_platform.noting() as of_prediction:
            remat.kept_bytes(
                config.model,
                shapes[1],
                loss=losses.make("dice_ce"),
                deterministic=deterministic,
            )
    assert of_prediction == of_step and of_step.keys() == {"windows", "routing"}
    assert all(way.startswith(how) for ways in of_step.values() for way in ways)


def test_auto_stands_alone(make_config):
    with pytest.raises(UserError, match="entry of model.remat is 'auto'"):
        dataclasses.replace(make_config().model, remat=("auto", "decoder"))
