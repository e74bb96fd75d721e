"""Five small models in TotalSegmentator's folders, and what becomes of their labels."""

import nibabel as nib
import numpy as np
import pytest
from flax import nnx
from scipy import ndimage

from swinsmt_jax import load, load_nnunet, load_totalsegmentator, models, save
from swinsmt_jax.checks import UserError
from swinsmt_jax.commands.inspect import lines_of
from swinsmt_jax.convert import nnunet_writer
from swinsmt_jax.data import nifti
from swinsmt_jax.inference.totalsegmentator import TASKS, resampled
from swinsmt_jax.labels import CLASS_NAMES
from swinsmt_jax.models.nnunet import PlainConvUNetConfig

FOLDERS = {291: "part1_organs", 292: "part2_vertebrae", 293: "part3_cardiac"}
FOLDERS |= {294: "part4_muscles", 295: "part5_ribs", 297: "total_3mm"}


def write_model(root, number, spacing, classes, *, names=None):
    """Write a random network whose plan is that of a part."""
    config = PlainConvUNetConfig(
        **{"in_channels": 1, "out_channels": len(classes) + 1},
        **{"features_per_stage": (4, 6), "strides": (1, 2), "n_conv_per_stage": 1},
    )
    model = models.create(config, rngs=nnx.Rngs(number))
    bias = model.head.bias[...]
    model.head.bias[...] = bias.at[0].set(0.5)  # some background
    return nnunet_writer.write(
        root / f"Dataset{number}_TotalSegmentator_{FOLDERS[number]}_1559subj",
        model,
        **{"patch_shape": (16, 16, 12), "spacing": (spacing,) * 3, "batch_size": 2},
        **{"clip": (-1000, 1000), "mean": 0.0, "std": 300.0},
        names=names or ("background", *(CLASS_NAMES[i] for i in classes)),
    )


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    root = tmp_path_factory.mktemp("results")
    for spacing, parts in TASKS.items():
        for number, classes in parts.items():
            write_model(root, number, spacing, classes)
    return root


def scan(path, spacing, shape=(14, 13, 9)):
    rng = np.random.default_rng(1)
    hu = ndimage.gaussian_filter(rng.normal(0, 3000, shape), 1).astype(np.int16)
    affine = np.diag([-spacing, spacing, 1.2 * spacing, 1])[[1, 0, 2, 3]]
    nib.save(nib.Nifti1Image(hu, affine), path)
    return path


@pytest.mark.parametrize("fast", [False, True])
def test_parts_are_merged_as_totalsegmentator_does(weights, tmp_path, fast):
    """Step by step with nibabel, scipy and one nnU-Net after the other."""
    path = scan(tmp_path / "ct.nii.gz", 2.0)
    segmenter = load_totalsegmentator(weights, fast=fast)
    labels = segmenter.segment(path)
    spacing = 3.0 if fast else 1.5
    image = nib.as_closest_canonical(nib.load(path))
    zooms = np.array(image.header.get_zooms(), np.float64)
    hu = ndimage.zoom(image.get_fdata(), zooms / spacing, order=1, mode="nearest")
    small = tmp_path / "small.nii.gz"
    grid = np.diag([spacing] * 3 + [1])
    nib.save(nib.Nifti1Image(hu.astype(np.int32), grid), small)
    merged = np.zeros(hu.shape, np.uint8)
    for number, classes in TASKS[spacing].items():
        folder = next(weights.glob(f"Dataset{number}_*"))
        found = load_nnunet(folder, mirror=False, overlap=0.2).segment(small)
        merged = np.where(found > 0, np.array([0, *classes], np.uint8)[found], merged)
    back = np.divide(image.shape, merged.shape)
    merged = ndimage.zoom(merged, back, order=0, mode="nearest")
    save(tmp_path / "out.nii.gz", labels, like=path)
    ours = nib.as_closest_canonical(nib.load(tmp_path / "out.nii.gz"))
    np.testing.assert_array_equal(np.asarray(ours.dataobj), merged)
    assert len(np.unique(labels)) > 10
    volume, ids = segmenter.read(path), [117, 5, 60]
    known = segmenter.decide_volume(volume, confidence=True, chosen=ids)
    np.testing.assert_array_equal(nifti.in_file_axes(known.labels, volume), labels)
    assert (known.probability[known.labels > 0] > 0).all()
    assert known.chosen.shape == (*volume.array.shape, 3)
    assert known.chosen.any((0, 1, 2)).all()
    for place, number in enumerate(ids):
        own = known.labels == number  # of a part whose label stands
        np.testing.assert_allclose(
            known.chosen[own][:, place] / 255, known.probability[own], atol=3e-3
        )
    assert segmenter.class_names[117] == CLASS_NAMES[117]


def test_images_are_cut_towards_zero_and_pass_at_the_models_spacing():
    image = np.float32([[[-10.5, 3.7, 11.2]]])
    same = resampled(image, (1.5, 1.5, 1.5), spacing=1.5)
    assert same is image
    found = resampled(np.float32([[[-10, 5]]]), (1.5, 1.5, 3.0), spacing=1.5)
    assert found.ravel().tolist() == [-10, -5, 0, 5]
    constant = resampled(np.full((10, 9, 8), -1000, "f4"), (2.9,) * 3, spacing=1.5)
    assert (constant == -1000).all()


def test_models_are_found_or_named(weights, tmp_path):
    with pytest.raises(UserError, match="does not exist"):
        load_totalsegmentator(tmp_path / "no")
    (tmp_path / "nnunet/results").mkdir(parents=True)
    root = tmp_path / "nnunet/results"
    with pytest.raises(UserError, match=r"lacks Dataset291_\*, Dataset292_\*, "):
        load_totalsegmentator(tmp_path)
    write_model(root, 297, 3.0, TASKS[3.0][297])
    assert load_totalsegmentator(tmp_path).spacing == 3.0
    with pytest.raises(UserError, match="the 1.5 mm task"):
        load_totalsegmentator(tmp_path, fast=False)


def test_the_earlier_name_of_accum_dtype_is_read_and_told_once(weights, caplog):
    with caplog.at_level("INFO", logger="absl"):
        found = load_totalsegmentator(weights, fast=False, sums="float16")
    assert {part.options["accum_dtype"] for part in found.parts} == {"float16"}
    assert caplog.text.count("the argument sums is now accum_dtype") == 1
    for loader in (load, load_nnunet):
        caplog.clear()
        with (
            caplog.at_level("INFO", logger="absl"),
            pytest.raises(UserError, match="no_such"),
        ):
            loader("no_such", sums="float16")
        assert caplog.text.count("the argument sums is now accum_dtype") == 1


def test_a_part_of_other_classes_is_refused(tmp_path):
    classes = TASKS[3.0][297][::-1]  # by name, whatever their order
    write_model(tmp_path, 297, 3.0, classes)
    (part,) = load_totalsegmentator(tmp_path, fast=True).parts
    assert part.ids.tolist() == [0, *classes]
    other = tmp_path / "other"
    names = ("background", *CLASS_NAMES[1:117], "tail")
    write_model(other, 297, 3.0, classes, names=names)
    with pytest.raises(UserError, match="must have 117, from spleen to costal"):
        load_totalsegmentator(other, fast=True)


def test_what_a_model_folder_is_is_said(weights, tmp_path):
    told = "\n".join(lines_of(weights))
    assert "models of nnU-Net v2 for 6 datasets" in told
    assert told.count(" mm: complete") == 2
    (dataset,) = weights.glob("Dataset297_*")
    told = "\n".join(lines_of(dataset))
    assert "__3d_fullres: a model folder of nnU-Net v2" in told
    assert "folds with a final checkpoint: 0" in told
    assert "voxels 3 mm, patch (16, 16, 12), CT" in told
    assert "nnunet_plain of " in told and "117 classes: spleen, " in told
    (checkpoint,) = dataset.glob("*/fold_0/*.pth")
    told = "\n".join(lines_of(checkpoint))
    assert "weights, " in told and "nnUNetTrainer, 3d_fullres" in told
    home = tmp_path / "home"
    (home / "nnunet" / "results").mkdir(parents=True)
    for folder in weights.glob("Dataset29[15]_*"):
        (home / "nnunet" / "results" / folder.name).symlink_to(folder)
    told = "\n".join(lines_of(home))
    assert "1.5 mm: lacks Dataset292, Dataset293, Dataset294" in told
    (tmp_path / "plans.json").write_text("{}")
    told = "\n".join(lines_of(tmp_path))
    assert "folds with a final checkpoint: none" in told
    assert "cannot be used here: " in told
