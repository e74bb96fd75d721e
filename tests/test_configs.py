import dataclasses
import importlib
from pathlib import Path

import pytest

from swinsmt_jax import SwinSMTConfig, models
from swinsmt_jax.checks import UserError
from swinsmt_jax.config import from_config_dict

FOLDER = Path(__file__).resolve().parents[1] / "swinsmt_jax" / "configs"
FILES = sorted(path.stem for path in FOLDER.glob("*.py"))
NAMES = [name for name in FILES if name != "nnunet_finetune"]  # needs a plan

PARAMETERS = {
    "swin_smt_paper": 170_783_560,
    "swin_smt_e4": 73_053_256,
    "swin_smt_e8": 87_014_728,
    "swin_smt_e16": 114_937_672,
    "swin_unetr_b": 72_767_752,
    "nnunet_plain": 31_288_974,
    "nnunet_resenc_m": 102_443_150,
    "nnunet_resenc_l": 102_443_150,
    "unetr": 102_036_406,
    "ux_net": 53_011_606,
    "repux_net": 65_833_366,
    "universal_model": 62_493_939,
    "nnformer": 149_960_014,
    "unest": 87_204_663,
    "dints": 152_364_822,
}
MILLIONS = {"swin_unetr_s": 18.35, "swin_unetr_l": 290.40}


def load(name):
    return importlib.import_module(f"swinsmt_jax.configs.{name}")


def experiment(name):
    return from_config_dict(load(name).get_config())


@pytest.mark.parametrize("name", NAMES)
def test_every_config_is_valid_and_says_how_to_run_it(name):
    module = load(name)
    config = experiment(name)
    assert f"--config=configs/{name}.py --workdir=runs/{name}" in module.__doc__
    assert config.model.out_channels == 118


@pytest.mark.parametrize("name", FILES)
def test_configs_are_light(name):
    lines = (FOLDER / f"{name}.py").read_text().splitlines()
    imports = {line for line in lines if line.startswith(("import ", "from "))}
    allowed = ("from ml_collections import config_dict", "from swinsmt_jax.configs")
    assert all(line.startswith(allowed) for line in imports)


@pytest.mark.parametrize("name", PARAMETERS)
def test_parameter_counts(name):
    assert models.count_parameters(experiment(name).model) == PARAMETERS[name]


def test_parameter_counts_of_the_universal_model():
    """With text, which is no parameter, and with a head for the background too."""
    model = experiment("universal_model").model
    for changes, count in (
        ({"embeddings": "random"}, 62_595_315),
        ({"embeddings": "runs/not_made_yet.npy"}, 62_595_315),
        ({"zero_plane": False}, 62_494_195),
    ):
        changed = dataclasses.replace(model, **changes)
        assert models.count_parameters(changed) == count


@pytest.mark.parametrize("name", MILLIONS)
def test_rounded_parameter_counts(name):
    count = models.count_parameters(experiment(name).model)
    assert round(count / 1e6, 2) == MILLIONS[name]


def test_the_papers_network():
    model = experiment("swin_smt_paper").model
    assert model == SwinSMTConfig(
        in_channels=1,
        out_channels=118,
        feature_size=48,
        num_experts=32,
        num_moe_stages=3,
        residual_conv=False,
        patch_merging="legacy",
        dtype="bfloat16",
        remat=model.remat,
    )


@pytest.mark.parametrize("name", sorted({*PARAMETERS, *MILLIONS}))
def test_variants_differ_from_the_paper_in_the_network_alone(name):
    paper, variant = experiment("swin_smt_paper"), experiment(name)
    if name in ("nnformer", "nnunet_resenc_m", "unest"):  # are of 96^3
        assert variant.data.patch_shape == (96, 96, 96)
        data = dataclasses.replace(variant.data, patch_shape=paper.data.patch_shape)
    else:
        data = variant.data
    own_loss = {"universal_model": "one_vs_all"}.get(name, paper.training.loss)
    assert data == paper.data
    assert variant.training == dataclasses.replace(paper.training, loss=own_loss)
    assert variant.optimizer == paper.optimizer


@pytest.mark.parametrize("name", ["unetr", "nnformer", "unest"])
def test_a_patch_other_than_the_networks_only_shape_is_refused(name):
    values = load(name).get_config()
    values.data.patch_shape = (64, 64, 64)
    with pytest.raises(UserError, match="data.patch_shape .* accepts only .*: its"):
        from_config_dict(values)
