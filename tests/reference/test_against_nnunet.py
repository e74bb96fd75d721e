"""nnU-Net itself predicts with folders that are written here: needs nnunetv2."""

import json
import os

import nibabel as nib
import numpy as np
import pytest
from flax import nnx

from swinsmt_jax import load_nnunet, models
from swinsmt_jax.config import (
    DataConfig,
    ExperimentConfig,
    OptimizerConfig,
    TrainingConfig,
)
from swinsmt_jax.convert import command, files, nnunet_folder, to_torch
from swinsmt_jax.models.nnunet import PlainConvUNetConfig, ResidualEncoderUNetConfig

for name in ("raw", "preprocessed", "results"):  # nnU-Net warns without them
    os.environ.setdefault(f"nnUNet_{name}", os.devnull)
torch = pytest.importorskip("torch")
predictor = pytest.importorskip("nnunetv2.inference.predict_from_raw_data")
COMMON = {
    **{"in_channels": 1, "out_channels": 4, "features_per_stage": (4, 8, 8)},
    **{"strides": (1, (2, 2, 1), 2), "kernel_sizes": (3, (3, 3, 1), 3)},
}
CONFIGS = {
    "plain": PlainConvUNetConfig(**COMMON),
    "residual": ResidualEncoderUNetConfig(**COMMON, n_blocks_per_stage=(1, 2, 1)),
}


class FloatSums:
    """PyTorch for nnU-Net's predictor, whose two sums of windows are then float32."""

    half = torch.float32

    def __getattr__(self, name):
        return getattr(torch, name)


def predicted(folder, scan, target):
    """Return nnU-Net's predictor of a folder, and its labels of a scan."""
    nnunet = predictor.nnUNetPredictor(
        device=torch.device("cpu"), verbose=False, use_mirroring=True, allow_tqdm=False
    )
    nnunet.initialize_from_trained_model_folder(str(folder), (0,))
    nnunet.predict_from_files_sequential([[str(scan)]], [str(target)])
    return nnunet, np.asarray(nib.load(f"{target}.nii.gz").dataobj)


def run_of(model, workdir):
    """Write a run of a network, in which `convert` finds all that a folder needs."""
    config = ExperimentConfig(
        model=model.config,
        data=DataConfig(
            **{"root": "", "patch_shape": (16, 12, 10), "batch_size": 2},
            **{"spacing": (2.0, 2.0, 4.0), "classes": ("liver", "spleen", "heart")},
        ),
        optimizer=OptimizerConfig(learning_rate=1e-3),
        training=TrainingConfig(num_steps=1),
    )
    weights = workdir.with_suffix(".safetensors")
    files.write(weights, to_torch(model))
    command.from_torch(config, weights=weights, workdir=workdir, partial=False)


@pytest.mark.reference
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", CONFIGS)
def test_nnunet_predicts_with_a_run_of_ours(name, tmp_path, rng, monkeypatch):
    """Its axes are others than ours, so weights and plan are turned on the way.

    With float32 sums in nnU-Net every label is the same. Its own are in half precision,
    and of random weights on noise the classes nearly tie: that alone changed 21 (plain)
    and 10 (residual) of the 7,140 voxels; see tests/inference/test_nnunet.py for
    trained networks, of which it changes at most 0.2 % of the foreground.
    """
    model = models.create(CONFIGS[name], rngs=nnx.Rngs(1))
    run_of(model, tmp_path / "run")
    command.to_nnunet(
        workdir=tmp_path / "run", output=tmp_path / "Dataset001_Own", step=None
    )
    folder = nnunet_folder.find(tmp_path / "Dataset001_Own")
    hu = rng.normal(0, 400, (21, 20, 17)).astype(np.int16)
    affine = np.diag([-2.2, 2.0, 3.5, 1.0])[[1, 0, 2, 3]]
    (tmp_path / "in").mkdir()
    nib.save(nib.Nifti1Image(hu, affine), tmp_path / "in/x_0000.nii.gz")
    scan = tmp_path / "in/x_0000.nii.gz"
    nnunet, theirs = predicted(folder, scan, tmp_path / "x")
    ours = load_nnunet(folder).segment(scan)
    assert len(np.unique(theirs)) > 2
    assert np.mean(ours == theirs) > 0.995
    monkeypatch.setattr(predictor, "torch", FloatSums())
    _, exact = predicted(folder, scan, tmp_path / "exact")
    assert np.count_nonzero(ours != exact) <= 2
    window = rng.normal(size=(1, 10, 12, 16, 1)).astype(np.float32)
    with torch.no_grad():
        nnunet.network.load_state_dict(nnunet.list_of_parameters[0])
        nnunet.network.eval()
        wanted = nnunet.network(torch.from_numpy(np.moveaxis(window, -1, 1)))
    found = np.moveaxis(model(window.transpose(0, 3, 2, 1, 4)), -1, 1)
    wanted = wanted.numpy().transpose(0, 1, 4, 3, 2)
    np.testing.assert_allclose(found, wanted, atol=2e-5)


@pytest.mark.reference
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("masked", [False, True])
def test_nnunet_sees_scans_by_other_plans_alike(masked, tmp_path, rng, monkeypatch):
    """Z-scores, of a mask or of all; axes transposed; keys of a parent; label ids."""
    model = models.create(CONFIGS["plain"], rngs=nnx.Rngs(1))
    run_of(model, tmp_path / "run")
    folder = tmp_path / "Dataset001_Own"
    command.to_nnunet(workdir=tmp_path / "run", output=folder, step=None)
    folder = nnunet_folder.find(folder)
    plans = json.loads((folder / "plans.json").read_text())
    values = plans["configurations"]["3d_fullres"]
    values |= {"normalization_schemes": ["ZScoreNormalization"]}
    values |= {"use_mask_for_norm": [masked]}
    plans |= {"transpose_forward": [2, 0, 1], "transpose_backward": [1, 2, 0]}
    own = {"inherits_from": "base", "batch_size": 3}
    plans["configurations"] = {"base": values, "3d_fullres": own}
    (folder / "plans.json").write_text(json.dumps(plans))
    content = json.loads((folder / "dataset.json").read_text())
    content["labels"] = {"liver": 2, "background": 0, "heart": 9, "spleen": 5}
    (folder / "dataset.json").write_text(json.dumps(content))
    hu = rng.normal(0, 400, (21, 22, 17)).astype(np.int16)
    hu[hu == 0] = 1
    hu[:3], hu[8:11, 8:11, 8:11], hu[3:5, :, :4] = 0, 0, 0
    scan = tmp_path / "in/x_0000.nii.gz"
    scan.parent.mkdir()
    nib.save(nib.Nifti1Image(hu, np.diag([2.2, 2.0, 3.5, 1.0])), scan)
    monkeypatch.setattr(predictor, "torch", FloatSums())
    nnunet, theirs = predicted(folder, scan, tmp_path / "x")
    segmenter = load_nnunet(folder)
    ours = segmenter.segment(scan)
    assert len(np.unique(theirs)) > 2
    assert np.count_nonzero(ours != theirs) <= 2
    manager = nnunet.configuration_manager
    preprocessor = manager.preprocessor_class(verbose=False)
    found = preprocessor.run_case(
        [str(scan)], None, nnunet.plans_manager, manager, nnunet.dataset_json
    )
    view = segmenter.view(segmenter.read(scan)).image[..., 0]
    np.testing.assert_allclose(view, found[0][0], rtol=1e-4, atol=1e-4)
