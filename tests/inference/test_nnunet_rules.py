"""Rules of nnU-Net's plans that the shared folders do not have, on a folder of ours.

tests/reference/test_against_nnunet.py compares the same with nnU-Net itself.
"""

import json
import shutil

import nibabel as nib
import numpy as np
import pytest
from flax import nnx
from scipy import ndimage

from swinsmt_jax import load_nnunet, models
from swinsmt_jax.checks import UserError
from swinsmt_jax.convert import nnunet_folder, nnunet_writer
from swinsmt_jax.data import nnunet_plan
from swinsmt_jax.data.nnunet_plan import Normalization
from swinsmt_jax.data.nnunet_view import normalized
from swinsmt_jax.models.nnunet import PlainConvUNetConfig

NETWORK = PlainConvUNetConfig(
    **{"in_channels": 1, "out_channels": 3, "features_per_stage": (4, 6)},
    **{"strides": (1, (2, 2, 1)), "kernel_sizes": ((3, 3, 1), 3)},
    n_conv_per_stage=1,
    n_conv_per_stage_decoder=1,
)


@pytest.fixture
def folder(tmp_path):
    model = models.create(NETWORK, rngs=nnx.Rngs(0))
    return nnunet_writer.write(
        tmp_path / "Dataset001_X",
        model,
        **{"patch_shape": (8, 8, 6), "spacing": (2.0, 2.0, 4.0), "batch_size": 2},
        **{"clip": (-900, 900), "mean": 50.0, "std": 300.0},
        names=("background", "a", "b"),
    )


def change(folder, function):
    file = folder / "plans.json"
    plans = json.loads(file.read_text())
    function(plans, plans["configurations"]["3d_fullres"])
    file.write_text(json.dumps(plans))


@pytest.fixture
def scan(tmp_path, rng):
    """A scan with a frame of zeros, and zeros inside that the frame does not reach."""
    hu = rng.normal(0, 300, (14, 12, 9)).astype(np.int16)
    hu[hu == 0] = 1
    hu[:2], hu[6:8, 5:7, 4:6] = 0, 0
    hu[2:4, :, :3] = 0  # a corner of the box
    nib.save(nib.Nifti1Image(hu, np.diag([2.0, 2, 4, 1])), tmp_path / "x.nii.gz")
    return hu, tmp_path / "x.nii.gz"


def view_of(folder, path):
    segmenter = load_nnunet(folder)
    return segmenter.view(segmenter.read(path)).image[..., 0]


@pytest.mark.parametrize("masked", [False, True])
def test_z_scores_are_of_the_crop_or_of_what_is_inside(folder, scan, masked):
    hu, path = scan

    def z_score(plans, values):
        values["normalization_schemes"] = ["ZScoreNormalization"]
        values["use_mask_for_norm"] = [masked]

    change(folder, z_score)
    crop = hu[2:].astype(np.float64)
    inside = ndimage.binary_fill_holes(crop != 0) if masked else crop == crop
    assert inside[4:6, 5:7, 4:6].all()  # a hole counts as inside
    assert masked == (not inside.all())
    part = crop[inside]
    crop[inside] = (part - part.mean()) / part.std()
    np.testing.assert_allclose(
        view_of(folder, path), crop.transpose(2, 1, 0), atol=1e-5
    )
    if masked:
        assert not crop[~inside].any()


def test_a_constant_crop_has_no_deviation_to_divide_by():
    rule = Normalization("ZScoreNormalization")
    found = normalized(np.full((2, 2, 2), 7, np.int16), rule)
    np.testing.assert_array_equal(found, np.zeros((2, 2, 2), np.float32))


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 0, 1), (1, 2, 0), (2, 1, 0)])
def test_axes_are_transposed_and_put_back(folder, scan, order):
    """The network of turned weights and plan gives the same labels."""
    hu, path = scan
    plain = load_nnunet(folder).segment(path)
    turned = folder.parent / "turned"
    shutil.copytree(folder, turned)
    file = turned / "fold_0" / nnunet_folder.CHECKPOINT
    document = nnunet_folder.files.read_document(file)
    weights = document["network_weights"]
    document["network_weights"] = nnunet_folder.permuted_weights(weights, order)

    def transpose(plans, values):
        plans["transpose_forward"] = list(order)
        plans["transpose_backward"] = [order.index(axis) for axis in range(3)]
        arguments = values["architecture"]["arch_kwargs"]
        for key in ("patch_size", "spacing"):
            values[key] = [values[key][axis] for axis in order]
        for key in ("strides", "kernel_sizes"):
            arguments[key] = [[v[axis] for axis in order] for v in arguments[key]]

    change(turned, transpose)
    nnunet_folder.files.write_document(file, document)
    segmenter = load_nnunet(turned)
    assert segmenter.plan.transpose == order
    found = segmenter.segment(path)
    assert found.shape == hu.shape and len(np.unique(plain)) > 1
    assert np.count_nonzero(found != plain) <= 2


def test_a_configuration_takes_what_it_lacks_from_its_parents(folder):
    whole = nnunet_plan.read(folder, "3d_fullres")

    def inherit(plans, values):
        base = dict(values)
        plans["configurations"] = {
            "base": base,
            "between": {"inherits_from": "base", "batch_size": 7, "spacing": [1, 1, 1]},
            "3d_fullres": {"inherits_from": "between", "spacing": base["spacing"]},
        }

    change(folder, inherit)
    found = nnunet_plan.read(folder, "3d_fullres")
    assert found.batch_size == 7 and found.spacing == whole.spacing
    assert found.patch_shape == whole.patch_shape and found.network == whole.network
    change(folder, lambda plans, _: plans["configurations"].pop("base"))
    with pytest.raises(UserError, match="inherits_from of between is 'base'"):
        nnunet_plan.read(folder, "3d_fullres")

    def circle(plans, values):
        values["inherits_from"] = "3d_fullres"

    change(folder, circle)
    with pytest.raises(UserError, match="inherits_from of 3d_fullres"):
        nnunet_plan.read(folder, "3d_fullres")


def test_all_folds_are_fold_all_or_the_log_says_which(folder, caplog):
    shutil.copytree(folder / "fold_0", folder / "fold_3")
    with caplog.at_level("WARNING", logger="absl"):
        assert nnunet_folder.read(folder, folds=["all"]).folds == ("fold_0", "fold_3")
    assert "has no fold_all; --folds=all takes its folds 0, 3" in caplog.text
    caplog.clear()
    shutil.copytree(folder / "fold_0", folder / "fold_all")
    assert nnunet_folder.read(folder, folds=["all"]).folds == ("fold_all",)
    assert nnunet_folder.read(folder).folds == ("fold_0", "fold_3")  # as nnU-Net
    assert not caplog.text


def test_labels_of_ids_with_gaps_are_numbers_of_channels(folder, scan):
    """Keys in any order of the file: the ids in rising order are the channels."""
    _, path = scan
    plain = load_nnunet(folder).segment(path)
    file = folder / "dataset.json"
    content = json.loads(file.read_text())
    content["labels"] = {"b": 7, "ignore": 9, "background": 0, "a": [3]}
    file.write_text(json.dumps(content))
    segmenter = load_nnunet(folder)
    assert segmenter.class_names == {1: "a", 2: "b"}
    np.testing.assert_array_equal(segmenter.segment(path), plain)
