import importlib
from pathlib import Path

import pytest

from swinsmt_jax import models
from swinsmt_jax.config import SwinSMTConfig, from_config_dict

FOLDER = Path(__file__).resolve().parents[1] / "configs"
NAMES = sorted(path.stem for path in FOLDER.glob("*.py"))

PARAMETERS = {
    "swin_smt_paper": 170_783_560,
    "swin_smt_e4": 73_053_256,
    "swin_smt_e8": 87_014_728,
    "swin_smt_e16": 114_937_672,
    "swin_unetr_b": 72_767_752,
}
MILLIONS = {"swin_unetr_s": 18.35, "swin_unetr_l": 290.40}


def load(name):
    return importlib.import_module(f"configs.{name}")


def experiment(name):
    return from_config_dict(load(name).get_config())


@pytest.mark.parametrize("name", NAMES)
def test_every_config_is_valid_and_says_how_to_run_it(name):
    module = load(name)
    config = experiment(name)
    assert f"--config=configs/{name}.py --workdir=runs/{name}" in module.__doc__
    assert config.model.out_channels == 118


@pytest.mark.parametrize("name", NAMES)
def test_configs_are_light(name):
    lines = (FOLDER / f"{name}.py").read_text().splitlines()
    imports = {line for line in lines if line.startswith(("import ", "from "))}
    allowed = ("from ml_collections import config_dict", "from configs import ")
    assert all(line.startswith(allowed) for line in imports)


@pytest.mark.parametrize("name", PARAMETERS)
def test_parameter_counts(name):
    assert models.count_parameters(experiment(name).model) == PARAMETERS[name]


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


@pytest.mark.parametrize("name", [n for n in NAMES if n.startswith("swin_")])
def test_variants_differ_from_the_paper_in_the_network_alone(name):
    paper, variant = experiment("swin_smt_paper"), experiment(name)
    assert variant.data == paper.data and variant.training == paper.training
    assert variant.optimizer == paper.optimizer
