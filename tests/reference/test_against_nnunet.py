"""nnU-Net itself predicts with folders that are written here: needs nnunetv2."""

import os

import nibabel as nib
import numpy as np
import pytest
from flax import nnx

from swinsmt_jax import load_nnunet, models
from swinsmt_jax.convert import nnunet_writer
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


@pytest.mark.reference
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", CONFIGS)
def test_nnunet_predicts_with_a_folder_of_ours(name, tmp_path, rng):
    """Its axes are others than ours, so weights and plan are turned on the way."""
    model = models.create(CONFIGS[name], rngs=nnx.Rngs(1))
    folder = nnunet_writer.write(
        tmp_path / "Dataset001_Own",
        model,
        **{"patch_shape": (16, 12, 10), "spacing": (2.0, 2.0, 4.0), "batch_size": 2},
        **{"clip": (-1024, 1024), "mean": -1024, "std": 2048},
        names=("background", "liver", "spleen", "heart"),
    )
    hu = rng.normal(0, 400, (21, 20, 17)).astype(np.int16)
    affine = np.diag([-2.2, 2.0, 3.5, 1.0])[[1, 0, 2, 3]]
    (tmp_path / "in").mkdir()
    nib.save(nib.Nifti1Image(hu, affine), tmp_path / "in/x_0000.nii.gz")
    nnunet = predictor.nnUNetPredictor(
        device=torch.device("cpu"), verbose=False, use_mirroring=True, allow_tqdm=False
    )
    nnunet.initialize_from_trained_model_folder(str(folder), (0,))
    nnunet.predict_from_files_sequential(
        [[str(tmp_path / "in/x_0000.nii.gz")]], [str(tmp_path / "x")]
    )
    theirs = np.asarray(nib.load(tmp_path / "x.nii.gz").dataobj)
    ours = load_nnunet(folder).segment(tmp_path / "in/x_0000.nii.gz")
    assert len(np.unique(theirs)) > 2
    assert np.mean(ours == theirs) > 0.99  # of noise, with sums in half precision
    window = rng.normal(size=(1, 10, 12, 16, 1)).astype(np.float32)
    with torch.no_grad():
        nnunet.network.load_state_dict(nnunet.list_of_parameters[0])
        nnunet.network.eval()
        wanted = nnunet.network(torch.from_numpy(np.moveaxis(window, -1, 1)))
    found = np.moveaxis(model(window.transpose(0, 3, 2, 1, 4)), -1, 1)
    wanted = wanted.numpy().transpose(0, 1, 4, 3, 2)
    np.testing.assert_allclose(found, wanted, atol=2e-5)
