"""From the label counts of a store to warnings about the volumes of a prediction."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import nibabel as nib
import numpy as np
import pytest

from swinsmt_jax.config import from_config_dict, to_dict
from swinsmt_jax.data import pipeline, preprocess
from swinsmt_jax.inference.outputs import OutputOptions
from swinsmt_jax.inference.scans import segment_scans
from swinsmt_jax.inference.segmenter import Segmenter
from swinsmt_jax.training import setup

CASES, VOXEL_ML = 22, 0.008
CLASSES = ["liver", "spleen", "heart"]


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A store: livers of 20 to 41 voxels, hearts that the scan cuts, two spleens."""
    source = tmp_path_factory.mktemp("source")
    names = [f"c{i:02}" for i in range(CASES)]
    for i, name in enumerate(names):
        labels = np.zeros((10, 9, 8), np.uint8)
        labels[1:8, 1:7, 1].flat[: 20 + i] = 1
        labels[2:4, 2, 3] = 2 if i < 2 else 0
        labels[0, :, 5] = 3  # at the edge
        image = np.where(labels > 0, 50, -900).astype(np.int16)
        image[5, 5, 5] = 700
        for kind, array in (("ct", image), ("labels", labels)):
            file = source / f"{name}_{kind}.nii.gz"
            nib.save(nib.Nifti1Image(array, np.diag([2.0, 2, 2, 1])), file)
    layout = {"image": "{case}_ct.nii.gz", "labels": "{case}_labels.nii.gz"}
    layout |= {"classes": CLASSES, "splits": {"train": names}}
    (source / "dataset.json").write_text(json.dumps(layout))
    made = tmp_path_factory.mktemp("store") / "store"
    assert preprocess.preprocess(source, made) == {}
    return made


def config(root):
    model = {"name": "swin_unetr", "in_channels": 1, "out_channels": 4}
    data = {"root": str(root), "patch_shape": (32, 32, 32), "batch_size": 1}
    return from_config_dict(
        {
            "model": model | {"feature_size": 12},
            "data": data | {"hu_range": (0.0, 1000.0)},
            "optimizer": {"learning_rate": 1e-3},
            "training": {"num_steps": 1},
        }
    )


@pytest.fixture(scope="module")
def trained(root):
    """The config of an experiment as checkpoints keep it."""
    found = config(root)
    data, _, _ = setup.find_cases(found.data, num_classes=4, validated=False)
    kept = to_dict(dataclasses.replace(found, data=data))
    return from_config_dict(json.loads(json.dumps(kept)))


def test_percentiles_are_those_of_whole_structures_of_enough_cases(trained):
    usual = trained.data.seen.usual_ml
    assert set(usual) == {"liver"}  # hearts are cut, and spleens are too few
    wanted = np.percentile(np.arange(20, 20 + CASES) * VOXEL_ML, (1, 99))
    np.testing.assert_allclose(usual["liver"], wanted, atol=1e-3)


def test_cases_without_a_store_tell_no_volumes(root):
    assert pipeline.usual_ml(["a case"], CLASSES) == {}


@jax.jit
def by_brightness(windows):
    return -jnp.abs(windows * 4 - 0.5 - jnp.arange(4))


@pytest.mark.parametrize("voxels, unusual", [(30, False), (60, True), (8, True)])
def test_a_prediction_of_another_volume_is_warned_of(
    trained, tmp_path, voxels, unusual
):
    hu = np.full((10, 9, 8), 0, np.int16)
    hu[1:9, 1:8, 1:3].flat[:voxels] = 400
    affine = np.diag([2.0, 2, 2, 1])
    nib.save(nib.Nifti1Image(hu, affine), tmp_path / "a.nii.gz")
    found = segment_scans(
        Segmenter(trained, by_brightness, 1),
        {"a": tmp_path / "a.nii.gz"},
        tmp_path / "out",
        OutputOptions(quality=True),
    )
    said = [w for w in found["a"]["warnings"] if "training set" in w]
    assert len(said) == unusual and all(w.startswith("liver has ") for w in said)
    content = json.loads((tmp_path / "out/a_quality.json").read_text())
    assert content["with_usual_volume"] == 1
    kinds = {(w["check"], w["structure"]) for w in content["warnings"]}
    assert (("volume", "liver") in kinds) == unusual
