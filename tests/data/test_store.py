import gzip
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from swinsmt_jax import checks, labels
from swinsmt_jax.config import DataConfig
from swinsmt_jax.data import meta, pipeline, preprocess, store, store_report, transforms
from swinsmt_jax.data.augmentation import Augmentations, Zoom
from swinsmt_jax.data.case import load_case
from swinsmt_jax.data.layouts import totalsegmentator
from swinsmt_jax.phantoms import dataset as phantom

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    root = tmp_path_factory.mktemp("source")
    phantom.write_dataset(root, train=3, val=1, test=1, spacing=12.0, seed=0)
    return root


@pytest.fixture
def mine(source, tmp_path):
    """A copy of the dataset, to be spoilt; files are links."""
    root = tmp_path / "source"
    for file in source.rglob("*"):
        if file.is_file():
            target = root / file.relative_to(source)
            target.parent.mkdir(parents=True, exist_ok=True)
            target.hardlink_to(file)
    return root


def write_all(source, root, *, spacing=0.0, **options):
    """Preprocess without processes, as one worker does."""
    return preprocess.preprocess(source, root, spacing=spacing, **options)


@pytest.fixture(scope="module")
def root(source, tmp_path_factory):
    """A store made by a worker process."""
    root = tmp_path_factory.mktemp("store") / "store"
    assert write_all(source, root) == {}
    return root


def test_a_case_comes_back_bit_by_bit(source, root):
    for split in ("train", "val", "test"):
        stored = store.find_cases(root, split=split)
        raw = totalsegmentator.find_cases(source, split=split)
        assert [case.name for case in stored] == [case.name for case in raw]
        for one, other in zip(stored, raw, strict=True):
            sample, expected = one.read(), load_case(other)
            np.testing.assert_array_equal(sample.image, expected.image)
            np.testing.assert_array_equal(sample.label, expected.label)
            np.testing.assert_allclose(sample.affine, expected.affine)
            counts = np.bincount(expected.label.reshape(-1), minlength=118)
            assert one.facts["counts"] == counts.tolist()


def test_a_box_is_read_alone_and_in_its_place(root):
    case = store.find_cases(root, split="train")[0]
    whole, box = case.read(), (slice(3, 20), slice(0, 7), slice(10, 43))
    part = case.read(box)
    np.testing.assert_array_equal(part.image, whole.image[box])
    np.testing.assert_array_equal(part.label, whole.label[box])
    np.testing.assert_allclose(part.affine[:3, 3], (whole.affine @ [3, 0, 10, 1])[:3])


def test_samples_of_voxels_are_what_they_say(root):
    case = store.find_cases(root, split="train")[0]
    whole, voxels = case.read(), np.load(case.folder / store.VOXELS)
    at = {name: whole.label[tuple(v.T)] for name, v in voxels.items() if v.ndim == 2}
    assert (at["foreground"] > 0).all() and (at["background"] == 0).all()
    np.testing.assert_array_equal(
        voxels["background_hu"], whole.image[tuple(voxels["background"].T)]
    )
    few = min((whole.label > 0).sum(), store.SAMPLES)
    assert len(np.unique(voxels["foreground"], axis=0)) == few


def settings(root, **changes):
    return DataConfig(
        str(root),
        patch_shape=(16, 16, 24),
        batch_size=2,
        num_threads=1,
        **changes,
    )


def test_crops_are_balanced_centred_and_aligned(root):
    case = store.find_cases(root, split="train")[0]
    whole, rng = case.read(), np.random.default_rng(0)
    air, shape = -1024, (9, 9, 9)
    box = case.bounds(air)
    above = np.argwhere(whole.image > air)
    found = [(side.start, side.stop - 1) for side in box]
    assert found == list(zip(above.min(0), above.max(0), strict=True))
    options = {"foreground_ratio": 0.7, "air": air}
    for _ in range(50):
        crop = transforms.balanced_crop(case, rng, shape=shape, **options)
        first = np.linalg.solve(case.affine, crop.affine[:, 3])[:3].round().astype(int)
        place = tuple(slice(a, a + n) for a, n in zip(first, shape, strict=True))
        np.testing.assert_array_equal(crop.image, whole.image[place])
        np.testing.assert_array_equal(crop.label, whole.label[place])
    centres = [
        transforms.balanced_crop(case, rng, shape=(1, 1, 1), **options)
        for _ in range(400)
    ]
    labelled = np.mean([centre.label[0, 0, 0] > 0 for centre in centres])
    assert 0.62 < labelled < 0.78
    assert all(centre.image[0, 0, 0] > air for centre in centres)


def test_centres_are_uniform_over_labelled_voxels(root):
    case = store.find_cases(root, split="train")[0]
    whole, rng = case.read().label, np.random.default_rng(0)
    middle = np.median(np.argwhere(whole > 0), axis=0)
    places = []
    for _ in range(600):
        crop = transforms.balanced_crop(
            case, rng, shape=(1, 1, 1), foreground_ratio=1.0, air=-1024
        )
        places.append(np.linalg.solve(case.affine, crop.affine[:, 3])[:3])
    share = (np.array(places).round() <= middle).mean(axis=0)
    expected = (np.argwhere(whole > 0) <= middle).mean(axis=0)
    np.testing.assert_allclose(share, expected, atol=0.08)  # four standard errors


def test_a_small_scan_is_padded_with_air(root):
    case = store.find_cases(root, split="train")[0]
    shape = tuple(2 * n for n in case.shape)
    crop = transforms.balanced_crop(
        case, np.random.default_rng(0), shape=shape, foreground_ratio=1, air=-1024
    )
    assert crop.image.shape == crop.label.shape == shape
    assert (crop.label > 0).sum() == (case.read().label > 0).sum()
    assert crop.image[0, 0, 0] == -1024 and crop.label[0, 0, 0] == 0


@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_the_stream_is_a_function_of_seed_and_step(root, workers):
    config = settings(
        root, num_workers=workers, augmentations=Augmentations(zoom=Zoom(0.5))
    )
    cases = pipeline.find_cases(config, split="train")

    def take(start, count):
        batches = pipeline.training_batches(config, cases, seed=3, start_step=start)
        found = [next(batches) for _ in range(count)]
        batches.close()
        return found

    plain = replace(config, num_workers=0)
    alone = pipeline.training_batches(plain, cases, seed=3)
    expected = [next(alone) for _ in range(4)]
    alone.close()
    for one, other in zip(expected, [*take(0, 2), *take(2, 2)], strict=True):
        for name in ("image", "label", "case"):
            np.testing.assert_array_equal(one[name], other[name])


def test_a_whole_scan_is_read_as_from_the_dataset(source, root):
    config = settings(root)
    (case,) = pipeline.find_cases(config, split="test")
    (raw,) = totalsegmentator.find_cases(source, split="test")
    for read in (lambda c: c.read(), partial(pipeline.load_foreground, config)):
        stored, expected = read(case), read(raw)
        for name in ("image", "label", "affine"):
            np.testing.assert_allclose(getattr(stored, name), getattr(expected, name))


def test_another_spacing_is_resampled_once(source, tmp_path):
    write_all(source, tmp_path / "store", spacing=18.0)
    config = settings(tmp_path / "store", spacing=18.0)
    (case,) = pipeline.find_cases(config, split="test")
    (raw,) = totalsegmentator.find_cases(source, split="test")
    stored, expected = (pipeline.load_foreground(config, c) for c in (case, raw))
    np.testing.assert_array_equal(stored.image, expected.image)
    with pytest.raises(checks.UserError, match="spacing is 3, but .*--spacing=18"):
        pipeline.settled(replace(config, spacing=3.0), num_classes=118)
    found = pipeline.settled(replace(config, spacing=0.0), num_classes=118)
    assert found.spacing == 18 and found.classes == labels.CLASS_NAMES[1:]
    with pytest.raises(checks.UserError, match="--spacing=18, but .*another --store"):
        write_all(source, tmp_path / "store", spacing=3.0)


def test_bad_cases_are_named_and_the_others_go_on(mine, tmp_path):
    names = list(meta.read(mine))
    nan = nib.load(mine / names[0] / "ct.nii.gz")
    array = nan.get_fdata().astype(np.float32)
    array[0, 0, 0] = np.nan
    replace_file(mine / names[0] / "ct.nii.gz", nib.Nifti1Image(array, nan.affine))
    (mine / names[1] / "ct.nii.gz").unlink()
    huge = nib.Nifti1Image(np.zeros((2, 2, 2), np.int16), np.eye(4))
    huge.header.set_data_shape((30000, 30000, 30000))
    replace_bytes(mine / names[2] / "ct.nii.gz", gzip.compress(huge.header.binaryblock))
    replace_bytes(mine / names[3] / "segmentations.nii.gz", b"\x1f\x8b broken")
    failed = write_all(mine, tmp_path / "store")
    assert list(failed) == names[:4]
    for name, words in zip(
        names,
        ("NaN or infinite", "does not exist", "27000000000000", "not a NIfTI file"),
        strict=False,
    ):
        assert words in failed[name] and name in failed[name]
    assert (tmp_path / "store" / names[4] / "case.json").exists()
    assert not list((tmp_path / "store").glob(".partial*"))
    summary = store_report.write(tmp_path / "store")
    assert "1 cases (0 train, 0 val, 1 test)" in summary and "4 failed" in summary
    page = (tmp_path / "store" / "report.html").read_text()
    assert "NaN or infinite" in page and "data:image/png" in page
    again = json.loads((tmp_path / "store" / "report.json").read_text())
    assert again["failed"] == failed
    assert [c.name for c in store.find_cases(tmp_path / "store", split="test")]


def replace_file(path, image):
    path.unlink()
    nib.save(image, path)


def replace_bytes(path, content):
    path.unlink()
    path.write_bytes(content)


def test_a_run_continues_and_what_is_there_stays(source, tmp_path):
    root = tmp_path / "store"
    write_all(source, root)
    names = list(meta.read(root))
    kept = root / names[0] / "case.json"
    before = kept.stat().st_mtime_ns
    (root / names[1] / "case.json").unlink()
    (root / ".partial-1-s9").mkdir()
    with pytest.raises(checks.UserError, match=f"lacks 1 cases.*{names[1]}"):
        store.find_cases(root, split="train")
    with pytest.raises(checks.UserError, match="exclude names 's9999'"):
        write_all(source, root, exclude=["s9999"])
    write_all(source, root, exclude=[names[2]])
    assert kept.stat().st_mtime_ns == before
    assert not (root / ".partial-1-s9").exists() and (root / names[2]).exists()
    write_all(source, root, exclude=[names[2]], prune=True)
    assert not (root / names[2]).exists()
    found = [case.name for case in store.find_cases(root, split="train")]
    assert found == names[:2]


def test_what_cannot_be_a_store_is_refused(source, root, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(checks.UserError, match="holds other files"):
        write_all(source, tmp_path)
    (tmp_path / "store.json").write_text('{"format": 9, "options": {}}')
    lost = shutil.copytree(root, tmp_path / "lost")
    (lost / "meta.csv").unlink()
    with pytest.raises(checks.UserError, match="meta.csv does not exist"):
        store.find_cases(lost, split="train")
    with pytest.raises(checks.UserError, match="format 9, but this version reads 1"):
        store.find_cases(tmp_path, split="train")


def test_a_full_disk_ends_the_run_and_leaves_nothing_half_written(source, tmp_path):
    root, names = tmp_path / "store", list(meta.read(source))
    write_all(source, root)
    for name in names[1:]:
        shutil.rmtree(root / name)
    limit, most = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**14, most))  # no larger file
    try:
        with pytest.raises(checks.UserError, match=f"{names[1]}.*make room") as told:
            write_all(source, root)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, most))
    assert "File too large" in str(told.value)
    assert [f.parent.name for f in root.glob("*/case.json")] == names[:1]
    kept = {names[0], "meta.csv", "store.json", ".lock"}
    assert {entry.name for entry in root.iterdir()} == kept
    with pytest.raises(checks.UserError, match="not finished"):
        store.find_cases(root, split="train")
    assert write_all(source, root) == {}
    assert len(store.find_cases(root, split="train")) == 3


@pytest.mark.slow
def test_a_killed_run_leaves_nothing_half_written(source, tmp_path):
    command = [
        *(sys.executable, "preprocess.py", f"--source={source}"),
        *(f"--store={tmp_path / 'store'}", "--workers=2"),
    ]
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    process = subprocess.Popen(
        command, cwd=ROOT, env=environment, start_new_session=True
    )
    deadline = time.monotonic() + 120
    while not list(tmp_path.glob("store/s*/case.json")):
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    subprocess.run(command, cwd=ROOT, env=environment, check=True)
    for split, count in (("train", 3), ("val", 1), ("test", 1)):
        cases = store.find_cases(tmp_path / "store", split=split)
        assert len(cases) == count
        for case in cases:
            case.read()
    assert not list((tmp_path / "store").glob(".partial*"))
