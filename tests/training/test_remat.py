"""model.remat="auto": the least recomputation that fits, predicted and compiled."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import pytest

from swinsmt_jax import sharding
from swinsmt_jax.checks import UserError
from swinsmt_jax.models.registry import AUTO
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
            mesh=mesh,
        )

    return call


def test_nothing_is_recomputed_where_all_fits(compile_step):
    _, found, choice = compile_step(10**12)
    assert choice.parts == ()
    assert choice.compiled == found.needed
    assert 0.8 < choice.predicted / choice.compiled < 1.5


@pytest.mark.parametrize("limit", [1000, None])
def test_all_is_recomputed_where_nothing_fits_or_the_memory_is_unknown(
    compile_step, make_config, limit
):
    _, found, choice = compile_step(limit)
    assert choice.parts == make_config().model.remat_parts
    assert found.fits == (limit is None)
    assert 0.8 < choice.predicted / choice.compiled < 1.8


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
    steps = {"num_steps": 2}
    plain = loop.train(make_config(training=steps), workdir=tmp_path / "plain")
    config = make_config(model={"remat": "auto"}, training=steps)
    assert config.model.remat == AUTO
    with caplog.at_level("INFO"):
        chosen = loop.train(config, workdir=tmp_path / "auto")
    assert "remat: nothing is recomputed in the backward pass" in caplog.text
    (start,) = json.loads((tmp_path / "auto/run.json").read_text())["starts"]
    assert start["remat"]["parts"] == []
    same = jax.tree.map(lambda a, b: bool((a == b).all()), plain.params, chosen.params)
    assert all(jax.tree.leaves(same))


def test_auto_stands_alone(make_config):
    with pytest.raises(UserError, match="entry of model.remat is 'auto'"):
        dataclasses.replace(make_config().model, remat=("auto", "decoder"))
