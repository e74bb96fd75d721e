import json

import nibabel as nib
import numpy as np
import pytest

from swinsmt_jax import checks, class_map
from swinsmt_jax.config import DataConfig
from swinsmt_jax.data import meta, pipeline, preprocess, store
from swinsmt_jax.data.dataset import open_dataset

SHAPE = (6, 5, 4)


def save(path, array):
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(array, np.eye(4)), path)


def label_of(*numbers):
    """A label array with one plane of each number, the rest background."""
    label = np.zeros(SHAPE, np.uint8)
    for plane, number in enumerate(numbers):
        label[plane] = number
    return label


def write_image(path):
    save(path, np.arange(np.prod(SHAPE), dtype=np.int16).reshape(SHAPE))


def described(root, **changes):
    """Write two cases with files of label ids, and their description."""
    for name in ("a", "b"):
        write_image(root / f"ct/{name}.nii")
        save(root / f"truth/{name}.nii", label_of(0, 1, 2))
    content = {
        "classes": ["liver", "tumour"],
        "groups": {"all": ["liver", "tumour"]},
        "image": "ct/{case}.nii",
        "labels": "truth/{case}.nii",
        "splits": {"train": ["a"], "test": ["b"]},
    }
    content |= changes
    content = {key: value for key, value in content.items() if value is not None}
    (root / "dataset.json").write_text(json.dumps(content))
    return root


def nnunet(root, *, numbered=True, **changes):
    """Write seven training cases and a test case in nnU-Net's layout."""
    for i in range(8):
        part = "Ts" if i == 7 else "Tr"
        write_image(root / f"images{part}/c{i}{'_0000' * numbered}.nii.gz")
        save(root / f"labels{part}/c{i}.nii.gz", label_of(0, 2, 1))
    write_image(root / "imagesTs/unlabelled_0000.nii.gz")
    content = {
        "channel_names": {"0": "CT"},
        "labels": {"background": 0, "kidney": 1, "tumour": 2},
        "file_ending": ".nii.gz",
    }
    (root / "dataset.json").write_text(json.dumps(content | changes))
    return root


def read_back(root, store_root, **options):
    failed = preprocess.preprocess(root, store_root, **options)
    assert failed == {}
    return store.find_cases(store_root, split="train")


def test_a_dataset_of_ones_own_is_described_by_json(tmp_path):
    dataset = open_dataset(described(tmp_path / "raw"))
    assert dataset.classes.names == ("background", "liver", "tumour")
    assert dataset.splits == {"a": "train", "b": "test"}
    (case,) = read_back(tmp_path / "raw", tmp_path / "store")
    np.testing.assert_array_equal(case.read().label, label_of(0, 1, 2))
    assert store.read_options(tmp_path / "store").classes == dataset.classes


def test_a_table_without_cases_is_refused(tmp_path):
    (tmp_path / "meta.csv").write_text("image_id;split\n")
    with pytest.raises(checks.UserError, match="lists no cases: its table of splits"):
        open_dataset(tmp_path)


def test_another_modality_is_left_in_peace(tmp_path):
    for modality, told in (("CT", True), ("MR", False)):
        root = described(tmp_path / modality, modality=modality)
        (case,) = read_back(root, tmp_path / f"{modality}_store")
        assert ("unlike Hounsfield" in " ".join(case.facts["notes"])) == told


def test_masks_of_any_name_are_merged_in_order(tmp_path):
    pattern = "{case}_{class}_seg.nii.gz"
    root = described(tmp_path / "raw", labels=None, masks=pattern)
    for name in ("a", "b"):
        save(root / f"{name}_tumour_seg.nii.gz", label_of(0, 1, 1))
        save(root / f"{name}_liver_seg.nii.gz", label_of(1, 1, 0))
    (case,) = read_back(root, tmp_path / "store")
    np.testing.assert_array_equal(case.read().label, label_of(1, 2, 2))
    assert case.facts["overlapping_voxels"] == 20


def test_a_subset_makes_the_others_background(tmp_path):
    root = described(tmp_path / "raw")
    (case,) = read_back(root, tmp_path / "store", classes=["tumour"])
    np.testing.assert_array_equal(case.read().label, label_of(0, 0, 1))
    with pytest.raises(checks.UserError, match="tumour .1., but now liver.*another"):
        preprocess.preprocess(root, tmp_path / "store")


def test_a_subset_of_masks_needs_no_other_masks(tmp_path):
    root = tmp_path / "raw"
    write_image(root / "s1/ct.nii.gz")
    save(root / "s1/segmentations/liver.nii.gz", label_of(0, 1))
    meta.add(root, {"s1": "train"})
    (case,) = read_back(root, tmp_path / "store", classes=["liver"])
    np.testing.assert_array_equal(case.read().label, label_of(0, 1))


def test_the_first_release_is_read_by_its_own_classes(tmp_path):
    root = tmp_path / "raw"
    write_image(root / "s1/ct.nii.gz")
    save(root / "s1/segmentations.nii.gz", label_of(93, 104))
    meta.add(root, {"s1": "train"})
    read_back(root, tmp_path / "store", description="v1")
    found = store.read_options(tmp_path / "store").classes
    assert found == class_map.VERSIONS["v1"]


@pytest.mark.parametrize("numbered", [True, False])
def test_nnunets_layout_is_read(tmp_path, numbered):
    root = nnunet(tmp_path / "raw", numbered=numbered)
    dataset = open_dataset(root)
    assert dataset.classes.names == ("background", "kidney", "tumour")
    assert dataset.splits["c4"] == "val" and dataset.splits["c7"] == "test"
    assert list(dataset.splits.values()).count("train") == 6
    case = read_back(root, tmp_path / "store")[0]
    np.testing.assert_array_equal(case.read().label, label_of(0, 2, 1))


def test_nnunets_first_fold_is_the_validation(tmp_path):
    root = nnunet(tmp_path)
    folds = [{"train": ["c0"], "val": ["c1", "c2"]}, {"train": [], "val": []}]
    (root / "splits_final.json").write_text(json.dumps(folds))
    splits = open_dataset(root).splits
    assert [name for name in splits if splits[name] == "val"] == ["c1", "c2"]
    assert [name for name in splits if splits[name] == "train"] == ["c0"]


def test_what_a_fold_of_nnunet_says_of_cases_is_kept(tmp_path):
    root = nnunet(tmp_path)
    file = root / "splits_final.json"
    file.write_text(json.dumps([{"train": ["c0", "c1", "c9"], "val": ["c1", "c2"]}]))
    dataset = open_dataset(root)
    assert dataset.splits == {"c0": "train", "c2": "val", "c7": "test"}
    assert "'c9' is a training case of" in dataset.refused["c9"]
    assert "both a training and a validation case" in dataset.refused["c1"]
    file.write_text(json.dumps([{"val": ["c1"]}]))  # of hand-written folds
    splits = open_dataset(root).splits
    assert list(splits.values()).count("train") == 6 and splits["c1"] == "val"
    for wrong in ([], {"val": []}, [{"train": ["c0"]}], [3]):
        file.write_text(json.dumps(wrong))
        with pytest.raises(checks.UserError, match="is not nnU-Net's list of folds"):
            open_dataset(root)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"channel_names": {"0": "CT", "1": "PET"}}, "one, the CT, is needed"),
        ({"channel_names": {"0": "T2"}}, "channel 'T2', but a CT in Hounsfield units"),
        ({"labels": {"background": 0, "a": [1, 2]}}, "regions made of several labels"),
        ({"labels": {"background": 0, "a": 2}}, "must be 0 for the background"),
        ({"labels": {"background": 0, "a": 1, "ignore": 1}}, "'ignore' is 1, but must"),
        ({"file_ending": ".png"}, "file_ending is '.png'"),
    ],
)
def test_what_of_nnunet_is_not_supported_is_said(tmp_path, changes, words):
    with pytest.raises(checks.UserError, match=words):
        open_dataset(nnunet(tmp_path, **changes))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"colour": 1}, "a key of .*dataset.json is 'colour'"),
        ({"image": None}, "lacks the key 'image'"),
        ({"image": "ct.nii"}, r"image is 'ct.nii', but must be a path with \{case\}"),
        ({"masks": "{case}/{class}.nii"}, "one of the keys 'labels'"),
        ({"labels": None, "masks": "{case}.nii"}, "masks is"),
        ({"splits": ["a"]}, "splits is"),
        ({"modality": ""}, "modality is '', but must be a name"),
        ({"splits": {"training": ["a"]}}, "a split is 'training'"),
        ({"classes": "v3"}, "the class map is 'v3'"),
        ({"groups": {"g": ["lung"]}}, "a class of the group 'g' is 'lung'"),
    ],
)
def test_a_bad_description_is_refused_by_key(tmp_path, changes, words):
    with pytest.raises(checks.UserError, match=words):
        open_dataset(described(tmp_path, **changes))


def test_a_comma_is_refused_in_names_of_ones_own_and_replaced_in_nnunets(tmp_path):
    names = ["liver", "vein, portal"]
    own = described(tmp_path / "own", classes=names, groups={"all, both": ["liver"]})
    with pytest.raises(checks.UserError) as told:
        open_dataset(own)
    for words in (str(own), "'vein, portal'", "split at commas", "to 'vein_portal'"):
        assert words in str(told.value)
    given = {"background": 0, **{name: i for i, name in enumerate(names, start=1)}}
    other = nnunet(tmp_path / "other", labels=given)
    assert open_dataset(other).classes.names[1:] == ("liver", "vein_portal")


def test_bad_cases_of_a_description_are_refused_alone(tmp_path):
    splits = {"train": ["a", "../b", "none"], "val": ["b"], "test": ["b"]}
    root = described(tmp_path / "raw", splits=splits)
    failed = preprocess.preprocess(root, tmp_path / "store")
    assert set(failed) == {"b", "'../b' of the split 'train'", "none"}
    assert "more than once" in failed["b"]
    assert "plain name" in failed["'../b' of the split 'train'"]
    assert "none.nii, does not exist" in failed["none"]
    (case,) = store.find_cases(tmp_path / "store", split="train")
    assert case.name == "a"


def settings(root, **changes):
    return DataConfig(root=str(root), patch_shape=(32, 32, 32), batch_size=1, **changes)


def test_a_network_is_trained_and_used_with_one_set_of_classes(tmp_path):
    root = described(tmp_path / "raw")
    read_back(root, tmp_path / "store")
    config = settings(tmp_path / "store", spacing=0.0)
    with pytest.raises(
        checks.UserError,
        match="out_channels is 118, but must be 3: .*liver, tumour .2.",
    ):
        pipeline.settled(config, num_classes=118)
    config = pipeline.settled(config, num_classes=3)
    assert config.class_names == ("background", "liver", "tumour")
    assert len(pipeline.find_cases(config, split="train")) == 1
    (raw,) = pipeline.find_cases(settings(root), split="train")
    assert raw.read().label.max() == 2
    other = described(tmp_path / "other", classes=["lung", "heart"], groups={})
    read_back(other, tmp_path / "other_store")
    for bad in (settings(tmp_path / "other_store"), settings(tmp_path / "store")):
        bad = DataConfig(**{**vars(bad), "classes": ("bone",)})
        with pytest.raises(checks.UserError, match="classes are bone .*but .* has"):
            pipeline.settled(bad, num_classes=3)


def test_a_folder_of_no_known_layout_is_told_of_descriptions(tmp_path):
    with pytest.raises(checks.UserError, match=r"meta\.csv does not.*dataset\.json"):
        open_dataset(tmp_path)
