"""Every row of the table trains and is evaluated by the same two commands."""

import json
import shutil
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from absl import flags

import swinsmt_jax
from swinsmt_jax.commands import evaluate, train
from swinsmt_jax.config import from_config_dict
from swinsmt_jax.phantoms.dataset import write_dataset
from swinsmt_jax.runtime import startup
from swinsmt_jax.training import loop

ROOT = Path(__file__).parents[1]
pytestmark = [
    pytest.mark.slow,
    # of ml_collections, when it loads a config file
    pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning"),
]

PATCH = (32, 32, 32)
SWIN = {"feature_size": 12, "window_size": (4, 4, 4), "remat": ()}
SMT = {**SWIN, "num_experts": 2}
NNUNET = {"features_per_stage": (4, 4, 8), "strides": (1, 2, 2), "remat": ()}
RESENC = {
    **NNUNET,
    "n_blocks_per_stage": (1, 1, 1),
    "n_conv_per_stage_decoder": (1, 1),
}
# What makes each network tiny, by name of its config.
ROWS = {
    "swin_smt_paper": SMT,
    "swin_smt_e4": SMT,
    "swin_smt_e8": SMT,
    "swin_smt_e16": SMT,
    "swin_unetr_s": SWIN,
    "swin_unetr_b": SWIN,
    "swin_unetr_l": SWIN,
    "nnunet_plain": {
        **NNUNET,
        "n_conv_per_stage": (1, 1, 1),
        "n_conv_per_stage_decoder": (1, 1),
    },
    "nnunet_resenc_m": RESENC,
    "nnunet_resenc_l": RESENC,
    "unetr": {
        "img_size": (32, 32, 32),
        "feature_size": 4,
        "hidden_size": 24,
        "mlp_dim": 24,
        "remat": (),
    },
    "ux_net": {
        "depths": (1, 1, 1, 1),
        "feat_size": (4, 4, 8, 8),
        "hidden_size": 8,
        "remat": (),
    },
    "repux_net": {
        "depths": (1, 1, 1, 1),
        "feat_size": (4, 4, 8, 8),
        "hidden_size": 8,
        "kernel_size": 9,
        "remat": ("encoder",),
    },
    "universal_model": {**SWIN, "groups": 4, "hidden": 8},
    "nnformer": {
        "crop_size": (32, 32, 32),
        "embedding_dim": 24,
        "num_heads": (3, 3, 3, 3),
        "depths": (2, 2, 1, 1),
        "remat": (),
    },
    "unest": {
        "img_size": (64, 64, 64),
        "feature_size": 2,
        "embed_dim": (8, 16, 64),
        "depths": (1, 1, 1),
        "num_heads": (1, 2, 4),
        "remat": (),
    },
    "dints": {
        "architecture": ROOT / "tests" / "models" / "dints_two_blocks.json",
        "channel_mul": 0.125,
        "remat": (),
    },
}


@pytest.fixture(scope="module")
def phantoms(tmp_path_factory):
    root = tmp_path_factory.mktemp("phantoms")
    write_dataset(root, train=2, val=1, test=1, spacing=12, seed=0)
    return root


def test_every_row_is_here():
    rows = {path.stem for path in (ROOT / "configs").glob("*.py")}
    assert rows - {"demo", "real_scan", "nnunet_finetune"} == set(ROWS)


@pytest.mark.parametrize("name", ROWS)
def test_a_row_trains_continues_is_evaluated_and_predicts(
    name, phantoms, tmp_path, monkeypatch
):
    command = [
        "train.py",
        f"--config={ROOT}/configs/{name}.py",
        f"--workdir={tmp_path}",
        f"--config.data.root={phantoms}",
        f"--config.data.patch_shape={ROWS[name].get('img_size', PATCH)}",
        "--config.data.batch_size=1",
        "--config.data.spacing=0",
        "--config.mesh.data=1",
        "--config.training.num_steps=2",
        "--config.training.checkpoint_every=1",
        "--config.optimizer.warmup_steps=1",
        "--config.model.dtype=float32",
        *(f"--config.model.{key}={value}" for key, value in ROWS[name].items()),
    ]
    monkeypatch.setattr(sys, "argv", command)  # where config_flags finds overrides
    values = flags.FlagValues()
    train.define_flags(values)
    startup.parse(command, values)
    config = from_config_dict(values.config)
    state = loop.train(config, workdir=tmp_path)
    assert int(state.step) == 2
    shutil.rmtree(tmp_path / "checkpoints" / "2")
    continued = loop.train(config, workdir=tmp_path)
    jax.tree.map(np.testing.assert_array_equal, continued, state)

    options = flags.FlagValues()
    evaluate.define_flags(options)
    options(["evaluate.py", f"--workdir={tmp_path}", "--overlap=0"])
    assert "Dice (%)" in evaluate.evaluate(options)
    cases = json.loads((tmp_path / "eval_test/results.json").read_text())["cases"]
    ((case, scores),) = cases.items()

    segmenter = swinsmt_jax.load(tmp_path, overlap=0)
    found = np.unique(segmenter.segment(phantoms / case / "ct.nii.gz"))
    names = {segmenter.class_names[i] for i in found if i}
    assert names - scores["truth"].keys() == set(scores["false_positives"])
    assert names
