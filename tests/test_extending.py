"""The recipes of docs/extending.md run."""

import shutil
import subprocess
import sys
from pathlib import Path

import jax
import nibabel as nib
import numpy as np
import pytest
from flax import nnx
from ml_collections import ConfigDict

from swinsmt_jax import convert, models
from swinsmt_jax.config import from_config_dict
from swinsmt_jax.configs import demo
from swinsmt_jax.convert import files
from swinsmt_jax.data import store
from swinsmt_jax.models import registry
from swinsmt_jax.ops import by_platform
from swinsmt_jax.phantoms.dataset import write_dataset
from swinsmt_jax.training import checkpoint, loop, losses
from tests import recipes


@pytest.fixture(scope="module")
def phantoms(tmp_path_factory):
    root = tmp_path_factory.mktemp("phantoms")
    write_dataset(root, train=1, val=1, test=0, spacing=12, seed=0)
    return root


@pytest.mark.slow
def test_a_network_trains_and_gives_its_weights(phantoms, tmp_path):
    recipes.load("A network")
    values = demo.get_config()
    values.model = ConfigDict({"name": "res_unet", "in_channels": 1})
    values.model.update({"out_channels": 118, "width": 4})
    values.data.update({"root": str(phantoms), "patch_shape": (16, 16, 16)})
    values.data.batch_size = 8
    values.training.update({"num_steps": 2, "checkpoint_every": 1, "accumulate": 1})
    values.optimizer.warmup_steps = 1
    config = from_config_dict(values)
    assert isinstance(config.model, registry.config_class("res_unet"))
    loop.train(config, workdir=tmp_path / "run")
    _, model, info = checkpoint.load_model(tmp_path / "run")
    assert info["step"] == 2
    files.write(tmp_path / "w.safetensors", convert.to_torch(model))
    fresh = models.create(config.model, rngs=nnx.Rngs(1))
    convert.load_torch(fresh, files.read(tmp_path / "w.safetensors"))
    for name, array in convert.to_torch(model).items():
        np.testing.assert_array_equal(convert.to_torch(fresh)[name], array)


def test_a_loss(rng, monkeypatch):
    monkeypatch.setattr(losses, "LOSSES", dict(losses.LOSSES))
    monkeypatch.setattr(by_platform, "ENTRIES_ON_CPU", 1)  # a plane at a time
    exec(recipes.code("A loss"), {})
    loss = losses.make("jaccard_ce")
    features = rng.normal(size=(2, 4, 4, 4, 3)).astype(np.float32)
    labels = (features.sum(-1) > 0).astype(np.uint8)
    head = rng.normal(size=(3, 2)).astype(np.float32), np.zeros(2, np.float32)
    descend = jax.jit(
        jax.value_and_grad(lambda h: loss.of_features(features, *h, labels))
    )
    found = []
    for _ in range(20):
        value, gradient = descend(head)
        found.append(float(value))
        head = jax.tree.map(lambda p, g: p - g, head, gradient)
    assert found[-1] < 0.7 * found[0]
    logits = features @ head[0] + head[1]
    assert float(loss(logits, labels)) == pytest.approx(float(descend(head)[0]), 1e-5)


@pytest.fixture
def package(tmp_path):
    """A copy of the package, to add files and classes to, and a runner of code."""
    copy = tmp_path / "swinsmt_jax"
    ignored = shutil.ignore_patterns("__pycache__")
    shutil.copytree(Path(models.__file__).parents[1], copy, ignore=ignored)

    def run(code):
        command = [sys.executable, "-c", code]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout

    return copy, run


AUGMENTED = """
import numpy as np
from swinsmt_jax import checks
from swinsmt_jax.config import DataConfig
from swinsmt_jax.data import augmentation
from swinsmt_jax.data.augmentation import Augmentations, Contrast, Noise
from swinsmt_jax.data.sample import Sample

image = np.linspace(0, 1, 64, dtype=np.float32).reshape(4, 4, 4)
sample = Sample(image, np.zeros(image.shape, np.uint8), np.eye(4), "s1")
contrast = Augmentations(contrast=Contrast(1.0, factor=(0.5, 0.5)))
found = augmentation.augment(contrast, 3, sample, ("background",)).image
plain = augmentation.augment(Augmentations(), 3, sample, ("background",)).image
np.testing.assert_allclose(found - found.mean(), (plain - plain.mean()) / 2, atol=1e-6)
for bad in ({"probability": 7}, {"factor": (2, 1)}):
    try:
        Contrast(**bad)
    except checks.UserError as error:
        print(error)
"""


def test_an_augmentation(package):
    copy, run = package
    file = copy / "data" / "augmentation.py"
    before, after = file.read_text().split("Augmentations = ", 1)
    code = recipes.code("An augmentation")
    file.write_text(f"{before}{code}\n\nAugmentations = {after}")
    first, second = run(AUGMENTED).splitlines()
    assert "data.augmentations.contrast.probability is 7.0" in first
    assert "data.augmentations.contrast.factor is (2.0, 1.0)" in second


def test_a_layout(package, tmp_path):
    copy, run = package
    (copy / "data" / "layouts" / "house.py").write_text(recipes.code("A layout"))
    source = tmp_path / "source"
    for part, value in (("images", -100), ("labels", 5)):
        (source / part).mkdir(parents=True)
        for case in ("a", "b"):
            image = nib.Nifti1Image(np.full((6, 5, 4), value, np.int16), np.eye(4))
            nib.save(image, source / part / f"{case}.nii.gz")
    (source / "splits.csv").write_text("case,split\na,train\nb,val\n../c,train\n")
    failed = run(
        "from swinsmt_jax.data.preprocess import preprocess\n"
        f"print(*preprocess({str(source)!r}, 'store'))"
    )
    assert failed.strip() == "line 4"
    (case,) = store.find_cases(tmp_path / "store", split="val")
    assert case.name == "b" and (case.read().label == 5).all()
