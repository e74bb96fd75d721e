"""Datasets of which cases annotate some classes, or not all of their voxels."""

import json

import nibabel as nib
import numpy as np
import pytest

from swinsmt_jax.checks import UserError
from swinsmt_jax.commands.plan import plan
from swinsmt_jax.config import DataConfig
from swinsmt_jax.data import augmentation, pipeline, store
from swinsmt_jax.data.merge import merge
from swinsmt_jax.data.preprocess import preprocess
from swinsmt_jax.labels import IGNORED

AFFINE = np.diag([6.0, 6, 6, 1])
DESCRIPTION = {
    "classes": ["liver", "kidney_left", "kidney_right"],
    "image": "{case}/ct.nii.gz",
    "splits": {"train": ["a", "b"], "test": ["c"]},
}


def save(path, array):
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(array, AFFINE), path)


def label_map():
    label = np.zeros((12, 8, 8), np.uint8)
    label[2:4, 2:6, 2:6], label[5:7, 2:6, 2:6], label[9:11, 2:6, 2:6] = 1, 2, 3
    return label


def write_scans(root, names="abc"):
    for name in names:
        hu = np.full((12, 8, 8), 40, np.int16) + label_map() * 100
        save(root / name / "ct.nii.gz", hu.astype(np.int16))


def describe(root, **more):
    (root / "dataset.json").write_text(json.dumps(DESCRIPTION | more))


@pytest.fixture
def labelled(tmp_path):
    """Label files; case a annotates the liver, b the kidneys, c everything."""
    root = tmp_path / "labelled"
    write_scans(root)
    for name in "abc":
        save(root / name / "labels.nii.gz", label_map())
    annotated = {"a": ["liver"], "b": ["Kidney left", "kidney_right"]}
    describe(root, labels="{case}/labels.nii.gz", annotated=annotated)
    return root


@pytest.fixture
def masked(tmp_path):
    """Masks, of which those that are not there are of classes not annotated."""
    root = tmp_path / "masked"
    write_scans(root)
    for name, ids in (("a", [1]), ("b", [2, 3]), ("c", [1, 2, 3])):
        for k in ids:
            mask = (label_map() == k).astype(np.uint8)
            save(root / name / f"{DESCRIPTION['classes'][k - 1]}.nii.gz", mask)
    describe(root, masks="{case}/{class}.nii.gz", missing_masks="unannotated")
    return root


@pytest.fixture
def ignoring(tmp_path):
    """nnU-Net's layout with the label "ignore"; of case b a slab is ignored."""
    root = tmp_path / "ignoring"
    labels = {"background": 0, "liver": 1, "left": 2, "right": 3, "ignore": 4}
    for name in "abc":
        part = "Ts" if name == "c" else "Tr"
        hu = (40 + label_map() * 100).astype(np.int16)
        save(root / f"images{part}/{name}_0000.nii.gz", hu)
        label = label_map()
        if name == "b":
            label[:5] = 4
        save(root / f"labels{part}/{name}.nii.gz", label)
    content = {"channel_names": {"0": "CT"}, "labels": labels, "numTraining": 2}
    (root / "dataset.json").write_text(json.dumps(content | {"file_ending": ".nii.gz"}))
    return root


def samples(root, **options):
    """Return {case: sample} of all splits of a dataset or store."""
    found = {}
    for split in ("train", "test"):
        for case in pipeline.open_data(root, split=split, **options)[0]:
            found[case.name] = case.read()
    return found


@pytest.mark.parametrize("kind", ["labelled", "masked"])
def test_a_case_knows_which_classes_it_annotates(kind, request, tmp_path):
    """In files and in a store, whose other classes are background."""
    root = request.getfixturevalue(kind)
    assert preprocess(root, tmp_path / "store") == {}
    for found in (samples(root), samples(tmp_path / "store")):
        assert {n: s.annotated for n, s in found.items()} == {
            **{"a": (1,), "b": (2, 3), "c": None}
        }
        for name, known in (("a", [1]), ("b", [2, 3]), ("c", [1, 2, 3])):
            expected = np.where(np.isin(label_map(), known), label_map(), 0)
            np.testing.assert_array_equal(found[name].label, expected)
            assert not found[name].absent
    facts = store.read_json(tmp_path / "store/c/case.json")
    assert "annotated" not in facts and "ignored" not in facts  # as stores before


def test_a_subset_of_the_classes_keeps_what_is_annotated(labelled, tmp_path):
    preprocess(labelled, tmp_path / "store", classes=["liver", "kidney_right"])
    found = samples(tmp_path / "store")
    assert {n: s.annotated for n, s in found.items()} == {
        **{"a": (1,), "b": (2,), "c": None}
    }
    assert set(np.unique(found["b"].label)) == {0, 2}


def test_the_ignore_label_of_nnunet(ignoring, tmp_path):
    assert preprocess(ignoring, tmp_path / "store") == {}
    for found in (samples(ignoring), samples(tmp_path / "store")):
        label = found["b"].label
        assert np.all(label[:5] == IGNORED) and np.all(label[5:] == label_map()[5:])
        assert found["b"].annotated is None and found["b"].top == 3
        rng = np.random.default_rng(0)
        for kind in (True, False):
            x, _, _ = found["b"].draw_centre(rng, labelled=kind, air=-500)
            assert x >= 5
    facts = store.read_json(tmp_path / "store/b/case.json")
    assert facts["ignored"] == 5 * 64 and len(facts["counts"]) == 4
    assert store.damage(tmp_path / "store/b", whole=True) is None
    partial = [
        c.is_partial for c in store.find_cases(tmp_path / "store", split="train")
    ]
    assert partial == [False, True]


def test_ignored_voxels_survive_resampling(ignoring, tmp_path):
    preprocess(ignoring, tmp_path / "store", spacing=12)
    label = samples(tmp_path / "store")["b"].label
    assert np.all(label[:2] == IGNORED) and not np.any(label[3:] == IGNORED)


def config_of(root, **more):
    return DataConfig(root=str(root), patch_shape=(8, 8, 8), batch_size=2, **more)


def test_crops_tell_what_is_annotated(labelled, masked, tmp_path):
    preprocess(masked, tmp_path / "store")
    known = {"a": [1, 1, 0, 0], "b": [1, 0, 1, 1]}
    for root in (labelled, tmp_path / "store"):
        config = pipeline.settled(config_of(root), num_classes=4)
        cases = pipeline.find_cases(config, split="train")
        batches = pipeline.training_batches(config, cases, seed=0)
        batch = next(batches)
        batches.close()
        for index, found in zip(batch["case"], batch["annotated"], strict=True):
            assert found.tolist() == [bool(k) for k in known[cases[index].name]]


def test_mirroring_exchanges_the_sides_that_are_annotated(tmp_path):
    root = tmp_path / "sided"
    write_scans(root)
    for name in "abc":
        save(root / name / "labels.nii.gz", label_map())
    describe(root, labels="{case}/labels.nii.gz", annotated=["liver", "kidney_left"])
    values = {"root": str(root), "patch_shape": (12, 8, 8), "batch_size": 1}
    mirrored = augmentation.Augmentations(mirror=augmentation.Mirror(1.0))
    built = DataConfig(**values, augmentations=mirrored)
    built = pipeline.settled(built, num_classes=4)
    cases = pipeline.find_cases(built, split="train")
    batches = pipeline.training_batches(built, cases, seed=0)
    batch = next(batches)
    batches.close()
    assert batch["annotated"][0].tolist() == [True, True, False, True]
    assert set(np.unique(batch["label"])) == {0, 1, 3}


def test_without_partial_cases_batches_are_as_before(labelled):
    describe(labelled, labels="{case}/labels.nii.gz")
    config = pipeline.settled(config_of(labelled), num_classes=4)
    cases = pipeline.find_cases(config, split="train")
    batches = pipeline.training_batches(config, cases, seed=0)
    assert set(next(batches)) == {"image", "label", "case"}
    batches.close()


def test_another_annotation_makes_a_case_again(labelled, tmp_path, capsys):
    preprocess(labelled, tmp_path / "store")
    before = pipeline.fingerprint(
        pipeline.find_cases(config_of(labelled), split="train")
    )
    describe(labelled, labels="{case}/labels.nii.gz", annotated={"a": ["liver"]})
    after = pipeline.fingerprint(
        pipeline.find_cases(config_of(labelled), split="train")
    )
    assert before != after
    preprocess(labelled, tmp_path / "store", check=True)
    said = capsys.readouterr().out
    assert "b is made again: its files changed: which classes it annotates" in said
    assert "1 may be annotated in part: a" in said and "a is made again" not in said
    preprocess(labelled, tmp_path / "store")
    assert samples(tmp_path / "store")["b"].annotated is None


@pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning")
def test_a_plan_counts_the_cases_that_annotate_a_class(labelled):
    said = plan(str(labelled))
    assert "2/2" in said and "those that annotate it" in said


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({"annotated": "liver"}, "annotated is 'liver', but must list classes"),
        ({"annotated": ["livr"]}, "annotated names 'livr', but the classes are liver"),
        ({"annotated": {"a": [1]}}, "must list classes"),
        ({"missing_masks": "ignored"}, "missing_masks .* 'unannotated'"),
    ],
)
def test_what_cannot_be_meant_is_refused(labelled, more, words):
    describe(labelled, labels="{case}/labels.nii.gz", **more)
    with pytest.raises(UserError, match=words) as error:
        samples(labelled)
    assert "\n" not in str(error.value)


@pytest.fixture
def stores(tmp_path, labelled, ignoring):
    """A store of the described dataset, and one of nnU-Net's with other classes."""
    labels = {"background": 0, "Liver": 1, "spleen": 2, "aorta": 3, "ignore": 4}
    file = ignoring / "dataset.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"labels": labels}))
    preprocess(labelled, tmp_path / "one")
    preprocess(ignoring, tmp_path / "two")
    return [tmp_path / "one", tmp_path / "two"]


def test_stores_of_other_classes_become_one(stores, tmp_path):
    root = tmp_path / "both"
    known = merge(stores, root)
    names = ("background", "liver", "kidney_left", "kidney_right", "spleen", "aorta")
    assert store.read_options(root).classes.names == names
    assert known == dict(zip(names[1:], (5, 2, 2, 3, 3), strict=True))
    found = samples(root)
    assert {n: s.annotated for n, s in found.items()} == {
        **{"one_a": (1,), "one_b": (2, 3), "one_c": (1, 2, 3)},
        **{"two_a": (1, 4, 5), "two_b": (1, 4, 5), "two_c": (1, 4, 5)},
    }
    assert set(np.unique(found["two_c"].label)) == {0, 1, 4, 5}
    made = (root / "two_a/case.json").stat().st_mtime_ns
    assert merge(stores, root) == known  # again: what is there stays
    assert (root / "two_a/case.json").stat().st_mtime_ns == made
    assert np.all(found["two_b"].label[:5] == IGNORED)


def test_stores_that_do_not_go_together_are_refused(stores, labelled, tmp_path):
    preprocess(labelled, tmp_path / "coarse", spacing=12)
    for given, words in (
        (stores[:1], "must be two or more different stores"),
        ([stores[0], labelled], "is not a store; make one of each dataset"),
        ([stores[0], tmp_path / "coarse"], "--spacing=12, but .* with 0; preprocess"),
    ):
        with pytest.raises(UserError, match=words):
            merge(given, tmp_path / "merged")
