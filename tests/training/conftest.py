"""A network that compiles in a second, and scans of the size of its patch."""

import jax
import jax.numpy as jnp
import nibabel as nib
import numpy as np
import pytest
from flax import nnx

from swinsmt_jax.config import from_config_dict
from swinsmt_jax.models import network

CLASSES = 4


class Tiny(nnx.Module):
    """Two voxelwise experts between two linear maps, with the real parameter names."""

    def __init__(self, config, *, rngs):
        self.config = config
        f, e = config.feature_size, config.num_experts

        def draw(*shape):
            return nnx.Param(jax.random.normal(rngs.params(), shape))

        self.stem = nnx.Linear(1, f, rngs=rngs)
        self.mlp = nnx.Dict(experts=nnx.Dict(w1=draw(e, f, f), b1=draw(e, f)))
        self.blocks = nnx.List([nnx.Linear(f, config.out_channels, rngs=rngs)])

    def __call__(self, x, *, rngs=None):
        x = jnp.tanh(self.stem(x * 4))
        if rngs is not None and self.config.dropout:
            keep = jax.random.bernoulli(
                rngs.dropout(), 1 - self.config.dropout, x.shape
            )
            x = x * keep
        w1, b1 = (self.mlp["experts"][name][...] for name in ("w1", "b1"))
        y = jnp.tanh(jnp.einsum("bdhwc,ecf->bdhwef", x, w1) + b1)
        return self.blocks[0](x + y.mean(-2))


@pytest.fixture
def tiny(monkeypatch):
    """Make `models.create` build the tiny network."""
    monkeypatch.setattr(network, "create", lambda config, rngs: Tiny(config, rngs=rngs))


@pytest.fixture
def dataset(tmp_path, rng):
    """Three training cases and one of validation, labelled by brightness."""
    root = tmp_path / "data"
    rows = ["image_id;split"]
    for i, split in enumerate(("train", "train", "train", "val")):
        folder = root / f"s{i}"
        folder.mkdir(parents=True)
        labels = rng.integers(0, CLASSES, (34, 33, 32)).astype(np.uint8)
        hu = (labels * 500.0 - 900 + rng.normal(0, 50, labels.shape)).astype(np.int16)
        affine = np.diag([3.0, 3.0, 3.0, 1.0])
        nib.save(nib.Nifti1Image(hu, affine), folder / "ct.nii.gz")
        nib.save(nib.Nifti1Image(labels, affine), folder / "segmentations.nii.gz")
        rows.append(f"s{i};{split}")
    (root / "meta.csv").write_text("\n".join(rows) + "\n")
    return root


@pytest.fixture
def make_config(tmp_path):
    """Build an experiment for the tiny network; groups of keys are updated."""

    def make(**groups):
        values = {
            "model": {
                "name": "swin_smt",
                "in_channels": 1,
                "out_channels": CLASSES,
                "feature_size": 12,
                "num_experts": 2,
                "num_moe_stages": 1,
            },
            "data": {
                "root": str(tmp_path / "data"),
                "patch_shape": (32, 32, 32),
                "batch_size": 2,
                "num_threads": 1,
                "cache": True,
            },
            "optimizer": {"learning_rate": 1e-2},
            "training": {"num_steps": 6, "log_every": 1, "checkpoint_every": 2},
            "mesh": {"data": 1},
        }
        for name, changes in groups.items():
            values[name] = values.get(name, {}) | changes
        return from_config_dict(values)

    return make
