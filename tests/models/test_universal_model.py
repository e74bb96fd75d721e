"""The Universal Model's heads, embeddings and zero plane."""

import dataclasses
import json
import re
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from flax import nnx

from swinsmt_jax import convert, models
from swinsmt_jax.checks import UserError
from swinsmt_jax.labels import CLASS_NAMES
from swinsmt_jax.models import registry, universal_model
from swinsmt_jax.models.universal_model import ClassHeads, UniversalModelConfig
from swinsmt_jax.ops import by_platform
from swinsmt_jax.training import losses

NAMES = ("background", "liver", "spleen", "aorta")
ENTRY = registry.entry("universal_model")
CONFIG = UniversalModelConfig(1, 4, **ENTRY.tiny)


def heads(rng, *, batch=2, classes=3, zero_plane=True):
    kernels = rng.normal(size=(batch, classes, sum(universal_model.SIZES)))
    return ClassHeads(jnp.asarray(kernels, jnp.float32), zero_plane, "float32")


def by_hand(features, kernels):
    """Logits [B, ..., K], voxel by voxel and class by class, in float64."""
    logits = np.empty((*features.shape[:-1], kernels.shape[1]))
    for b, k in np.ndindex(kernels.shape[:2]):
        w1, w2, w3, b1, b2, b3 = np.split(
            kernels[b, k].astype(float), np.cumsum([64, 64, 8, 8, 8])
        )
        y = np.maximum(features[b] @ w1.reshape(8, 8).T + b1, 0)
        y = np.maximum(y @ w2.reshape(8, 8).T + b2, 0)
        logits[b, ..., k] = y @ w3 + b3
    return logits


def test_every_class_has_a_network_of_its_own(rng):
    head = heads(rng)
    features = rng.normal(size=(2, 2, 3, 4, 8)).astype(np.float32)
    logits = head(features)
    assert logits.shape[-1] == head.num_classes == 4
    np.testing.assert_array_equal(logits[..., 0], 0)
    expected = by_hand(features, np.asarray(head.kernels))
    np.testing.assert_allclose(logits[..., 1:], expected, rtol=1e-4, atol=1e-4)
    alone = heads(np.random.default_rng(0), zero_plane=False)(features)
    assert alone.shape[-1] == 3


@pytest.mark.parametrize("name", ["one_vs_all", "dice_ce"])
def test_the_loss_of_heads_in_blocks_equals_that_of_their_logits(
    rng, monkeypatch, name
):
    head = heads(rng)
    features = rng.normal(size=(2, 6, 3, 4, 8)).astype(np.float32)
    labels = rng.integers(0, 4, features.shape[:-1])
    loss = losses.make(name)
    run = jax.jit(jax.value_and_grad(loss.of_head, argnums=(0, 1)))
    whole = jax.value_and_grad(lambda x, h: loss(h(x), labels), argnums=(0, 1))
    monkeypatch.setattr(by_platform, "ENTRIES_ON_CPU", 2 * 3 * 4 * head.width)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6),
        run(features, head, labels),
        whole(features, head),
    )


def test_no_hidden_layer_of_all_classes_exists(monkeypatch):
    """Nor logits: in the loss and its gradient, of 117 classes."""
    shape, classes = (1, 32, 32, 32), 117
    monkeypatch.setattr(by_platform, "ENTRIES_ON_CPU", 32 * 32 * classes * 8)
    hidden = 4 * np.prod(shape) * classes * 8
    kernels = jax.ShapeDtypeStruct((1, classes, 153), jnp.float32)
    features = jax.ShapeDtypeStruct((*shape, 8), jnp.float32)
    labels = jax.ShapeDtypeStruct(shape, jnp.uint8)

    def loss(features, kernels, labels):
        head = ClassHeads(kernels, True, "float32")
        return losses.make("one_vs_all").of_head(features, head, labels)

    run = jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))
    memory = run.lower(features, kernels, labels).compile().memory_analysis()
    assert memory.temp_size_in_bytes < 0.3 * hidden


def test_blocks_of_planes_give_the_logits_of_all(rng, monkeypatch):
    graphdef, shapes = models.abstract_model(CONFIG)
    params = jax.tree.map(lambda a: 0.3 * rng.standard_normal(a.shape, "f4"), shapes)
    features = rng.normal(size=(2, 6, 3, 4, 8)).astype(np.float32)
    head, model = heads(rng), nnx.merge(graphdef, params)
    monkeypatch.setattr(
        type(model), "features_and_head", lambda *_, **__: (features, head)
    )
    monkeypatch.setattr(universal_model, "BLOCK", 2 * 3 * 4 * head.width)
    x = jnp.zeros((*features.shape[:-1], 1))
    np.testing.assert_allclose(jax.jit(model)(x), head(features), rtol=1e-5, atol=1e-5)


def test_random_embeddings_are_fixed_and_of_the_scale_of_text():
    rows = universal_model.random_embeddings(32, 512)
    np.testing.assert_array_equal(rows, universal_model.random_embeddings(32, 512))
    norms = np.linalg.norm(rows, axis=1)
    assert 8.1 < norms.min() and norms.max() < 9.6
    cosines = (rows @ rows.T) / np.outer(norms, norms)
    assert 0.75 < cosines.min() and 0.8 < cosines.mean() < 0.95


@pytest.fixture
def file(tmp_path, rng):
    """A file of embeddings, the names beside it, and what changes it."""
    path = tmp_path / "text.npy"

    def write(rows=None, names=NAMES[1:]):
        rows = rng.normal(size=(3, 6)).astype(np.float16) if rows is None else rows
        np.save(path, rows)
        path.with_suffix(".json").write_text(json.dumps(names))
        return path, rows

    return write


def test_embeddings_come_from_a_file_once(file):
    path, rows = file()
    config = dataclasses.replace(CONFIG, embeddings=str(path))
    config.check_classes(NAMES)
    model = models.create(config, rngs=nnx.Rngs(0))
    np.testing.assert_array_equal(model.organ_embedding[...], rows)
    np.testing.assert_array_equal(convert.to_torch(model)["organ_embedding"], rows)
    same = path.with_suffix(".safetensors")
    safetensors.numpy.save_file({"text": rows}, same)
    other = dataclasses.replace(config, embeddings=str(same))
    np.testing.assert_array_equal(universal_model.fixed_embeddings(other), rows)
    for gone in (path, same):
        gone.unlink()
    models.abstract_model(other)  # what evaluation makes a network by


@pytest.mark.parametrize(
    "rows, names, message",
    [
        (np.ones((4, 6)), NAMES[1:], r"shape \(4, 6\), but must have \(3, 6\)"),
        (np.ones((3, 512)), NAMES[1:], r"shape \(3, 512\), but must have \(3, 6\)"),
        (np.ones((3, 6)), NAMES[1:], "equal rows"),
        (np.full((3, 6), np.nan), NAMES[1:], "text.npy"),
        (np.array([["a"]]), NAMES[1:], "cannot be read as an array"),
        (None, ("liver", "aorta", "spleen"), "row 1 is 'aorta', but must be 'spleen'"),
        (None, NAMES[1:3], "names 2 classes and the data have 3: row 2 is None"),
        (None, {"a": 1}, r"must hold the names .* as a JSON list"),
    ],
)
def test_a_file_of_other_classes_or_size_is_refused(file, rows, names, message):
    path, _ = file(rows, names)
    config = dataclasses.replace(CONFIG, embeddings=str(path))
    with pytest.raises(UserError, match=message) as found:
        config.check_classes(NAMES)
    assert "\n" not in str(found.value)


def test_what_is_no_file_is_refused(tmp_path, file):
    for name in ("randon", str(tmp_path / "absent.npy"), "text.pt"):
        config = dataclasses.replace(CONFIG, embeddings=name)
        with pytest.raises(UserError, match="'learned', 'random' or an existing"):
            config.check_classes(NAMES)
    path, _ = file()
    path.with_suffix(".json").unlink()
    with pytest.raises(UserError, match=r"text.json cannot be read .* JSON list"):
        dataclasses.replace(CONFIG, embeddings=str(path)).check_classes(NAMES)
    with pytest.raises(UserError, match="model.groups is 3, but must divide"):
        dataclasses.replace(CONFIG, groups=3)


TORCH = "import contextlib\n\nno_grad = contextlib.nullcontext\n"
TRANSFORMERS = """
import numpy as np


class AutoTokenizer:
    @staticmethod
    def from_pretrained(folder):
        return lambda prompts, **_: {"prompts": prompts}


class CLIPModel:
    @staticmethod
    def from_pretrained(folder):
        return CLIPModel()

    def get_text_features(self, prompts):
        print(*prompts, sep="\\n")
        return np.random.default_rng(0).normal(size=(len(prompts), 512))
"""


def test_the_documented_script_makes_the_file(tmp_path):
    """With a stand-in for CLIP."""
    page = (Path(__file__).parents[2] / "docs/networks.md").read_text()
    blocks = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    (script,) = (block for block in blocks if "CLIPModel" in block)
    for name, text in (("torch", TORCH), ("transformers", TRANSFORMERS)):
        (tmp_path / f"{name}.py").write_text(text)
    done = subprocess.run(
        [sys.executable, "-c", script, "clip", "embeddings.npy"],
        **{"cwd": tmp_path, "capture_output": True, "text": True},
    )
    assert done.returncode == 0, done.stderr
    for said in ("Right Kidney", "Vertebra L5", "Left Rib 4", "Left Kidney Cyst"):
        assert f"A computerized tomography of a {said}\n" in done.stdout
    path = str(tmp_path / "embeddings.npy")
    config = dataclasses.replace(
        CONFIG, out_channels=118, text_size=512, embeddings=path
    )
    config.check_classes(CLASS_NAMES)
