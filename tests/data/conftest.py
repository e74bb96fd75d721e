"""A tiny dataset in the real layout, with masks and with the one label file."""

import shutil

import nibabel as nib
import numpy as np
import pytest

from swinsmt_jax import class_map, labels
from swinsmt_jax.config import DataConfig
from swinsmt_jax.data import meta, store
from swinsmt_jax.runtime import files

SHAPE = (12, 10, 8)
AFFINE = np.array([[2.0, 0, 0, -5], [0, 2, 0, 7], [0, 0, 3, 11], [0, 0, 0, 1]])


def write_nifti(path, array, affine=AFFINE):
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(array, affine), path)
    return path


@pytest.fixture(scope="session")
def volumes():
    """CT int16 and labels uint8 of one tiny scan."""
    rng = np.random.default_rng(0)
    ct = rng.integers(-900, 900, SHAPE).astype(np.int16)
    return ct, rng.integers(0, 118, SHAPE).astype(np.uint8)


@pytest.fixture(scope="session")
def pristine(tmp_path_factory, volumes):
    """s0001 (train) has 117 masks, s0002 (test) the same as one label file."""
    root = tmp_path_factory.mktemp("dataset")
    ct, label = volumes
    for name in ("s0001", "s0002"):
        write_nifti(root / name / "ct.nii.gz", ct)
    for i, name in enumerate(labels.CLASS_NAMES[1:], start=1):
        mask = (label == i).astype(np.uint8)
        write_nifti(root / f"s0001/segmentations/{name}.nii.gz", mask)
    write_nifti(root / "s0002/segmentations.nii.gz", label)
    (root / "meta.csv").write_text(
        "\ufeffimage_id;age;split\ns0001;50;train\ns0002;;test\n", encoding="utf-8"
    )
    return root


@pytest.fixture
def root(tmp_path, pristine):
    """A copy of the tiny dataset that a test may spoil."""
    return shutil.copytree(pristine, tmp_path / "dataset")


@pytest.fixture
def write():
    """The function that writes a NIfTI file."""
    return write_nifti


@pytest.fixture(scope="session")
def write_store():
    """The function that writes a store of scans for training."""

    def write(root, samples, names=("nose",)):
        root.mkdir()
        options = store.Options(0.0, class_map.make(names, {}, where="x"))
        index = {"format": store.FORMAT, "options": options.to_json()}
        files.write_json(root / store.INDEX, index)
        for sample in samples:
            store.write_case(root, sample, num_classes=len(names) + 1, facts={})
        splits = {sample.name: "train" for sample in samples}
        meta.add(root, splits)
        return DataConfig(str(root), (16, 16, 24), batch_size=4, classes=names)

    return write
