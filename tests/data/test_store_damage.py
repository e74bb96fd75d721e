import json
import shutil

import numpy as np
import pytest
import tensorstore

from swinsmt_jax import checks
from swinsmt_jax.data import preprocess, store, volume_file
from swinsmt_jax.data.sample import Sample
from swinsmt_jax.phantoms import dataset as phantom

FILES = (
    *("image/c/0/0/0", "label/c/0/0/0", "image/zarr.json", "label/zarr.json"),
    *("case.json", "voxels.npz"),
)


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    root = tmp_path_factory.mktemp("source")
    phantom.write_dataset(root, train=2, val=0, test=1, spacing=12.0, seed=0)
    return root


@pytest.fixture(scope="module")
def made(source, tmp_path_factory):
    root = tmp_path_factory.mktemp("made") / "store"
    assert preprocess.preprocess(source, root) == {}
    return root


def earlier(path, array):
    """Write a volume as commit 2c20246 did: no checksums, no chunks of zeros."""
    plain = [{"name": "bytes", "configuration": {"endian": "little"}}]
    lz4 = {"cname": "lz4", "clevel": 5, "shuffle": "shuffle"}
    sharding = {
        "chunk_shape": [32] * 3,
        "codecs": [*plain, {"name": "blosc", "configuration": lz4}],
        "index_codecs": [*plain, {"name": "crc32c"}],
    }
    shard = [-(-n // 32) * 32 for n in array.shape]
    metadata = {
        "shape": list(array.shape),
        "data_type": str(array.dtype),
        "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": shard}},
        "codecs": [{"name": "sharding_indexed", "configuration": sharding}],
    }
    kvstore = {"driver": "file", "path": str(path)}
    spec = {"driver": "zarr3", "kvstore": kvstore, "metadata": metadata}
    shutil.rmtree(path, ignore_errors=True)
    tensorstore.open(spec | {"create": True}).result().write(array).result()


@pytest.fixture(params=["of today", "of an earlier version"])
def root(made, tmp_path, request):
    """A copy of the store, to be spoilt."""
    root = shutil.copytree(made, tmp_path / "store")
    if request.param != "of today":
        for case in store.find_cases(made, split="train"):
            sample = case.read()
            earlier(root / case.name / "image", sample.image)
            earlier(root / case.name / "label", sample.label)
    return root


@pytest.mark.parametrize("name", FILES)
def test_a_lost_file_is_an_error_at_once_and_preprocessing_makes_it_anew(
    source, made, root, name
):
    lost, kept = store.find_cases(root, split="train")
    (lost.folder / name).unlink()
    with pytest.raises(checks.UserError, match=f"lacks 1 cases.*{lost.folder / name}"):
        store.find_cases(root, split="train")
    before = (kept.folder / "case.json").stat().st_mtime_ns
    assert preprocess.preprocess(source, root) == {}
    assert (kept.folder / "case.json").stat().st_mtime_ns == before
    whole = store.StoredCase(lost.name, "train", made / lost.name).read()
    found = store.find_cases(root, split="train")[0].read()
    np.testing.assert_array_equal(found.image, whole.image)
    np.testing.assert_array_equal(found.label, whole.label)


@pytest.mark.parametrize("name", FILES[:2])
def test_a_shard_that_vanishes_between_two_reads_is_an_error(root, name):
    case = store.find_cases(root, split="train")[0]
    box = (slice(0, 4),) * 3
    case.read(box)
    (case.folder / name).unlink()
    with pytest.raises(checks.UserError, match=f"{case.folder} .*{name}.* is missing"):
        case.read(box)


def test_stores_of_earlier_versions_are_read_with_their_chunks_of_zeros(tmp_path):
    image, label = np.full((40, 40, 40), -9, np.int16), np.zeros((40, 40, 40), np.uint8)
    image[:33, :33, :33] = 0
    sample = Sample(image, label, np.eye(4), "a")
    store.write_case(tmp_path, sample, num_classes=3, facts={})
    for name, array in (("image", image), ("label", label)):
        earlier(tmp_path / "a" / name, array)
    assert not (tmp_path / "a/label" / volume_file.SHARD).exists()
    found = store.StoredCase("a", "train", tmp_path / "a").read()
    np.testing.assert_array_equal(found.image, image)
    np.testing.assert_array_equal(found.label, label)
    assert store.damage(tmp_path / "a", whole=True) is None


def test_every_flipped_bit_of_voxels_is_noticed(made, tmp_path):
    root, rng = shutil.copytree(made, tmp_path / "store"), np.random.default_rng(0)
    case = store.find_cases(root, split="train")[0]
    for name in FILES[:2]:
        file = case.folder / name
        content = file.read_bytes()
        for place in rng.integers(len(content), size=20):
            flipped = bytearray(content)
            flipped[place] ^= 1 << int(rng.integers(8))
            file.write_bytes(flipped)
            with pytest.raises(checks.UserError, match=f"{case.folder} .*be read"):
                case.read()
        file.write_bytes(content)
    case.read()


def test_preprocessing_opens_what_it_passes_over(source, made, tmp_path):
    root = shutil.copytree(made, tmp_path / "store")
    one, other = (case.folder for case in store.find_cases(root, split="train"))
    (one / "case.json").write_text("")
    (other / "voxels.npz").write_bytes(b"")
    assert preprocess.preprocess(source, root) == {}
    for folder in (one, other):
        assert store.damage(folder, whole=True) is None


def test_verifying_compares_labels_with_their_counts(source, made, tmp_path):
    root = shutil.copytree(made, tmp_path / "store")
    case = store.find_cases(root, split="train")[0]
    label = store.find_cases(made, split="train")[0].read().label
    earlier(case.folder / "label", np.where(label == 0, 1, label).astype(np.uint8))
    preprocess.preprocess(source, root)
    assert (case.read().label > 0).all()
    preprocess.preprocess(source, root, verify=True)
    assert store.damage(case.folder, whole=True) is None


def test_a_shape_that_differs_from_the_case_is_an_error(made, tmp_path):
    root = shutil.copytree(made, tmp_path / "store")
    case = store.find_cases(root, split="train")[0]
    file = case.folder / "label/zarr.json"
    metadata = json.loads(file.read_text())
    metadata["shape"][0] -= 1
    file.write_text(json.dumps(metadata))
    with pytest.raises(checks.UserError, match="label has shape .*case.json says"):
        case.read((slice(0, 2),) * 3)
