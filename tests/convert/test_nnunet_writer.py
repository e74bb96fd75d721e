import numpy as np
import pytest
from flax import nnx

from swinsmt_jax import models
from swinsmt_jax.checks import UserError
from swinsmt_jax.convert import (
    files,
    nnunet_folder,
    nnunet_writer,
    read_weights,
    to_torch,
)
from swinsmt_jax.models.nnunet import ResidualEncoderUNetConfig
from swinsmt_jax.models.registry import entry

CONFIG = ResidualEncoderUNetConfig(
    **{"in_channels": 1, "out_channels": 3, "features_per_stage": (4, 6)},
    **{"strides": (1, (2, 2, 1)), "kernel_sizes": ((3, 3, 1), 3)},
    n_blocks_per_stage=1,
)
PLAN = {
    **{"patch_shape": (8, 6, 5), "spacing": (2.0, 2.0, 4.0), "batch_size": 2},
    **{"clip": (-1024, 1024), "mean": -1024.0, "std": 2048.0},
    "names": ("background", "a", "b"),
}


def test_a_folder_is_read_as_it_was_written(tmp_path, rng):
    model = models.create(CONFIG, rngs=nnx.Rngs(0))
    folder = nnunet_writer.write(tmp_path / "Dataset001_X", model, **PLAN)
    found = nnunet_folder.read(folder)
    assert found.plan.patch_shape == (5, 6, 8) and found.plan.spacing == (4, 2, 2)
    assert found.plan.names == PLAN["names"] and found.mirror_axes == ()
    assert found.network.strides == (1, (1, 2, 2))
    window = rng.normal(size=(1, 8, 6, 5, 1)).astype(np.float32)
    turned = found.models[0](window.transpose(0, 3, 2, 1, 4))
    expected = model(window).transpose(0, 3, 2, 1, 4)
    np.testing.assert_allclose(turned, expected, atol=1e-5)
    for name, array in read_weights(folder.parent).items():  # turned back
        np.testing.assert_array_equal(array, to_torch(model)[name])
    with pytest.raises(UserError, match="exists; give another"):
        nnunet_writer.write(tmp_path / "Dataset001_X", model, **PLAN)


def test_other_networks_are_refused(tmp_path):
    tiny = entry("unetr")
    config = tiny.config(in_channels=1, out_channels=3, **tiny.tiny)
    model = models.create(config, rngs=nnx.Rngs(0))
    with pytest.raises(UserError, match="nnU-Net has no network of UNETRConfig"):
        nnunet_writer.write(tmp_path / "x", model, **PLAN)
    assert not list(tmp_path.iterdir())


def test_one_array_of_several_names_is_stored_once(tmp_path, rng):
    array = rng.normal(size=(2, 3)).astype(np.float32)
    document = {"w": {"a": array, "b": array}, "n": (1, 2.5, None, True, [-1, "x"])}
    path = tmp_path / "x.pth"
    files.write_document(path, document)
    found = files.read_document(path)
    assert found["n"] == document["n"]
    for name in "ab":
        np.testing.assert_array_equal(found["w"][name], array)
    assert path.stat().st_size < 900 + array.nbytes
