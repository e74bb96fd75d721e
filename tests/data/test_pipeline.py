import ast
import contextlib
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from swinsmt_jax import checks
from swinsmt_jax.config import DataConfig
from swinsmt_jax.data import meta, pipeline, store, transforms
from swinsmt_jax.data.augmentation import Intensity
from swinsmt_jax.data.layouts import totalsegmentator
from swinsmt_jax.data.sample import Sample
from swinsmt_jax.phantoms import dataset as phantom

PATCH = (16, 16, 24)


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    root = tmp_path_factory.mktemp("phantoms") / "data"
    phantom.write_dataset(root, train=5, val=0, test=1, spacing=12, seed=0)
    return DataConfig(root=str(root), patch_shape=PATCH, batch_size=4, cache=True)


@pytest.fixture(scope="module")
def cases(config):
    return totalsegmentator.find_cases(config.root, split="train")


@pytest.fixture(scope="module")
def linked(tmp_path_factory, write_store):
    """The config of a store of 200 cases, all links to one of 40^3 voxels."""
    root, rng = tmp_path_factory.mktemp("linked") / "store", np.random.default_rng(0)
    image = rng.integers(-900, 900, (40, 40, 40), np.int16)
    label = rng.integers(0, 41, image.shape, np.uint8) * (image > 0)
    names = tuple(f"c{i}" for i in range(1, 41))
    config = write_store(root, [Sample(image, label, np.eye(4), "s0")], names)
    for i in range(1, 200):
        shutil.copytree(root / "s0", root / f"s{i}", copy_function=os.link)
    meta.add(root, {f"s{i}": "train" for i in range(1, 200)})
    return config


def take(count, config, cases, **keywords):
    batches = pipeline.training_batches(config, cases, **keywords)
    try:
        return [next(batches) for _ in range(count)]
    finally:
        batches.close()


def assert_same(a, b):
    assert len(a) == len(b)
    for x, y in zip(a, b, strict=True):
        assert x.keys() == y.keys()
        for key in x:
            np.testing.assert_array_equal(x[key], y[key])


def test_each_batch_has_memory_of_its_own(config, cases):
    """On a CPU, JAX may share that of a batch until a step has run."""
    a, b, c = take(3, config, cases, seed=0)
    for key in a:
        assert not np.shares_memory(a[key], b[key])
        assert not np.shares_memory(a[key], c[key])


def test_crops_are_normalised_after_augmentation(config, cases):
    (plain,), (normal,) = (
        take(1, replace(config, **changes), cases, seed=0)
        for changes in ({}, {"normalization": (100.0, 400.0)})
    )
    expected = (plain["image"] * 2048 - 1024 - 100) / 400
    np.testing.assert_allclose(normal["image"], expected, atol=1e-5)
    assert normal["image"].dtype == np.float32
    np.testing.assert_array_equal(normal["label"], plain["label"])


def test_batches_have_the_shapes_and_types_promised(config, cases):
    (batch,) = take(1, config, cases, seed=0)
    assert batch["image"].shape == (4, *PATCH, 1)
    assert batch["label"].shape == (4, *PATCH)
    assert batch["case"].shape == (4,)
    types = [batch[k].dtype for k in ("image", "label", "case")]
    assert types == [np.float32, np.uint8, np.int32]
    assert np.isfinite(batch["image"]).all()
    assert batch["label"].max() > 0


def test_each_epoch_takes_every_case_once_in_a_new_order(config, cases):
    order = np.concatenate([b["case"] for b in take(15, config, cases, seed=0)])
    epochs = order.reshape(-1, 5)
    assert all(sorted(epoch) == list(range(5)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) > 3


def test_crops_of_one_case_differ_between_epochs_and_seeds(config, cases):
    one = cases[:1]
    a, b = take(2, config, one, seed=0)
    assert not np.array_equal(a["label"][0], b["label"][0])
    assert not np.array_equal(a["label"][0], a["label"][1])
    (c,) = take(1, config, one, seed=1)
    assert not np.array_equal(a["label"], c["label"])
    assert_same(take(2, config, one, seed=0), [a, b])


@pytest.mark.parametrize(
    "changes",
    [{"num_threads": 1}, {"num_threads": 4, "cache": False}],
    ids=["1 thread", "no cache"],
)
def test_stream_does_not_depend_on_how_it_is_read(config, cases, changes):
    assert_same(
        take(6, replace(config, **changes), cases, seed=3),
        take(6, config, cases, seed=3),
    )


def test_stream_does_not_depend_on_worker_processes(config, cases):
    whole = take(7, config, cases, seed=3)
    workers = replace(config, num_workers=2, num_threads=1)
    assert_same(take(4, workers, cases, seed=3, start_step=3), whole[3:])


@pytest.mark.parametrize("start", [1, 3, 7])
def test_starting_late_continues_the_stream(config, cases, start):
    whole = take(9, config, cases, seed=5)
    assert_same(take(9 - start, config, cases, seed=5, start_step=start), whole[start:])


def test_starting_very_late_costs_nothing(config, cases):
    begin = time.perf_counter()
    take(1, config, cases, seed=5, start_step=10**7)
    assert time.perf_counter() - begin < 5


@pytest.mark.parametrize("count", [1, 2, 3, 4, 6, 12])
def test_processes_share_each_batch_without_loss_or_overlap(linked, count):
    config = replace(linked, batch_size=12)
    cases = pipeline.find_cases(config, split="train")[:8]
    steps = 4  # six epochs
    whole = take(steps, config, cases, seed=5)
    parts = [
        take(steps, config, cases, seed=5, process_index=i, process_count=count)
        for i in range(count)
    ]
    shared = [
        {
            key: np.stack([p[step][key] for p in parts], 1).reshape(value.shape)
            for key, value in whole[step].items()
        }
        for step in range(steps)
    ]
    assert_same(shared, whole)
    epochs = np.concatenate([batch["case"] for batch in shared]).reshape(6, 8)
    assert all(sorted(epoch) == list(range(8)) for epoch in epochs)


def test_resuming_with_other_processes_continues_the_stream(config, cases):
    whole = take(6, config, cases, seed=5)
    late = take(
        2, config, cases, seed=5, start_step=4, process_index=1, process_count=2
    )
    for batch, reference in zip(late, whole[4:], strict=True):
        np.testing.assert_array_equal(batch["label"], reference["label"][1::2])


def test_image_and_label_of_a_crop_belong_together(config, cases):
    """Bone is bright and lungs are dark under their labels in every augmented crop."""
    plain = replace(
        config,
        augmentations=replace(config.augmentations, intensity=Intensity(0.0)),
        foreground_ratio=1.0,
    )
    bone, lung = [], []
    for batch in take(12, plain, cases, seed=1):
        hu = batch["image"][..., 0] * 2048 - 1024
        bone.append(hu[(batch["label"] >= 25) & (batch["label"] <= 43)])
        lung.append(hu[(batch["label"] >= 10) & (batch["label"] <= 14)])
    assert np.median(np.concatenate(bone)) > 100
    assert np.median(np.concatenate(lung)) < -600


def test_memory_does_not_grow_with_the_cases_seen(linked):
    """What crops need of 150 further cases, 0.25 MB each, is not kept."""
    cases = pipeline.find_cases(linked, split="train")
    config = replace(linked, patch_shape=(8, 8, 8), batch_size=10)
    assert (cases[0].folder / store.VOXELS).stat().st_size > 2.5e5
    batches = pipeline.training_batches(config, cases, seed=0)
    with contextlib.closing(batches):
        held = [next(batches) and resident() for _ in range(20)]
    assert held[19] - held[4] < 20e6  # the first epoch's last and fifth batch


def resident():
    """Bytes of this process without page cache."""
    lines = Path("/proc/self/status").read_text().splitlines()
    (found,) = [line.split()[1] for line in lines if line.startswith("RssAnon")]
    return 1024 * int(found)


def test_reading_threads_never_have_python_parse_anything(linked, monkeypatch):
    """CPython 3.11 raised SystemError where two threads did so at once."""

    def refuse(_):
        raise SystemError("AST constructor recursion depth mismatch")

    cases = pipeline.find_cases(linked, split="train")
    monkeypatch.setattr(ast, "literal_eval", refuse)
    take(2, linked, cases, seed=0)


def test_a_box_that_the_store_lacks_is_found_once(linked, tmp_path):
    case = replace(pipeline.find_cases(linked, split="train")[0], folder=tmp_path / "x")
    shutil.copytree(Path(linked.root) / "s0", case.folder)
    above = np.argwhere(case.read().image > 850)
    expected = [*zip(above.min(0), above.max(0) + 1, strict=True)]
    assert [(s.start, s.stop) for s in case.bounds(850)] == expected
    shutil.rmtree(case.folder / "image")
    assert [(s.start, s.stop) for s in case.bounds(850)] == expected


@pytest.mark.parametrize("size", [500, -500])
def test_damaged_samples_of_voxels_are_named(linked, tmp_path, size):
    case = replace(pipeline.find_cases(linked, split="train")[0], folder=tmp_path / "x")
    shutil.copytree(Path(linked.root) / "s0", case.folder)
    file = case.folder / store.VOXELS
    file.write_bytes(file.read_bytes()[:size])
    with pytest.raises(checks.UserError, match=r"voxels.npz of the store cannot be"):
        take(1, linked, (case,), seed=0)


@pytest.mark.parametrize("kind", ["foreground", "background"])
def test_centres_are_uniform_also_where_voxels_are_sampled(
    tmp_path, write_store, monkeypatch, kind
):
    """Of 40 cases alike, each with its own sample of the voxels, and within one."""
    monkeypatch.setattr(store, "SAMPLES", 40)
    shape = (12, 12, 12)
    image = np.arange(1728, dtype=np.int16).reshape(shape)  # tells the place
    label = np.zeros(shape, np.uint8)
    label[2:10, 2:10, 2:10] = np.repeat([1, 2], 4)[:, None, None]
    image[(label == 0) & (image % 2 == 0)] = -1024  # air
    wanted = {
        "foreground": label > 0,
        "background": (label == 0) & (image > -1024),
    }[kind]
    samples = [Sample(image, label, np.eye(4), f"s{i}") for i in range(40)]
    config = write_store(tmp_path / "store", samples, ("a", "b"))
    cases = pipeline.find_cases(config, split="train")
    stored = [np.load(case.folder / store.VOXELS)[kind] for case in cases]
    assert {len(voxels) for voxels in stored} == {40}
    rng = np.random.default_rng(0)

    def drawn(case, count):
        ratio = float(kind == "foreground")
        options = {"shape": (1, 1, 1), "foreground_ratio": ratio, "air": -1024}
        crops = [transforms.balanced_crop(case, rng, **options) for _ in range(count)]
        return [crop.image.item() for crop in crops]

    def deviation(found, possible, groups):
        parts = np.array_split(np.sort(possible), groups)
        counts = [np.isin(found, part).sum() for part in parts]
        expected = np.array([len(part) for part in parts]) / len(possible)
        assert sum(counts) == len(found)  # never another voxel
        return stats.chisquare(counts, expected * len(found)).pvalue

    places = [place for case in cases for place in drawn(case, 4)]
    assert deviation(places, image[wanted], 8) > 1e-3
    own = image[tuple(stored[0].T)]
    own = own[own > -1024]
    assert deviation(drawn(cases[0], 400), own, len(own)) > 1e-3


def test_fingerprint_tells_datasets_apart(config, cases, tmp_path):
    mark = pipeline.fingerprint(cases)
    assert mark == pipeline.fingerprint(
        totalsegmentator.find_cases(config.root, split="train")
    )
    assert mark != pipeline.fingerprint(cases[:-1])
    assert mark != pipeline.fingerprint(cases[::-1])
    longer = tmp_path / "ct.nii.gz"
    longer.write_bytes(cases[0].ct.read_bytes() + b"0")
    assert mark != pipeline.fingerprint((replace(cases[0], ct=longer), *cases[1:]))


def test_bad_arguments_are_refused(config, cases):
    with pytest.raises(checks.UserError, match="at least one case"):
        pipeline.training_batches(config, (), seed=0)
    with pytest.raises(checks.UserError, match="batch_size is 4.*multiple of the 3"):
        pipeline.training_batches(config, cases, seed=0, process_count=3)
    with pytest.raises(checks.UserError, match="process_index is 2"):
        pipeline.training_batches(
            config, cases, seed=0, process_index=2, process_count=2
        )


def test_bad_file_is_named_when_its_turn_comes(config, cases, tmp_path):
    broken = tmp_path / "ct.nii.gz"
    broken.write_bytes(cases[0].ct.read_bytes()[:2000])
    bad = (replace(cases[0], ct=broken),)
    with pytest.raises(checks.UserError, match=r"ct\.nii\.gz is truncated"):
        take(1, config, bad, seed=0)


def test_data_layer_never_imports_jax():
    folder = Path(pipeline.__file__).parent
    for path in folder.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import | ast.ImportFrom):
                names = [
                    getattr(node, "module", None) or "",
                    *(a.name for a in node.names),
                ]
                assert not any(n.split(".")[0] in ("jax", "flax") for n in names), path


def test_phantoms_and_readers_do_not_load_jax():
    code = (
        "import sys; from swinsmt_jax.data import transforms, import_scan; "
        "from swinsmt_jax.phantoms import dataset; "
        "sys.exit('jax' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


SCRIPT = """
import jax
from swinsmt_jax.config import DataConfig
from swinsmt_jax.data import pipeline, store

class UsesJax(store.StoredCase):
    def read(self, box=None):
        assert jax.default_backend() == "cpu"
        return super().read(box)

if __name__ == "__main__":
    config = DataConfig({root!r}, (8, 8, 8), 1, num_workers=1, classes={classes})
    cases = [UsesJax(c.name, c.split, c.folder)
             for c in pipeline.find_cases(config, split="train")[:2]]
    batches = pipeline.training_batches(config, cases, seed=0)
    next(batches)
    batches.close()
    assert jax.config.jax_platforms == "cuda"  # this process stays as it was
"""


def test_worker_processes_never_take_an_accelerator(linked, tmp_path):
    script = tmp_path / "script.py"
    script.write_text(SCRIPT.format(root=linked.root, classes=linked.classes))
    environment = os.environ | {
        "JAX_PLATFORMS": "cuda",
        "PYTHONPATH": str(Path(pipeline.__file__).parents[2]),
    }
    command = [sys.executable, str(script)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_a_worker_that_is_killed_is_told(config, cases):
    batches = pipeline.training_batches(replace(config, num_workers=1), cases, seed=0)
    next(batches)
    (worker,) = multiprocessing.active_children()
    os.kill(worker.pid, signal.SIGKILL)
    with (
        contextlib.closing(batches),
        pytest.raises(checks.UserError, match="has died .*exit code -9.*num_workers"),
    ):
        for _ in range(100):
            next(batches)


ORPHANED = """
from swinsmt_jax.config import DataConfig
from swinsmt_jax.data import pipeline

if __name__ == "__main__":
    config = DataConfig({root!r}, (8, 8, 8), 1, num_workers=1, classes={classes})
    cases = pipeline.find_cases(config, split="train")
    batches = pipeline.training_batches(config, cases, seed=0)
    next(batches)
    print("ready", flush=True)
    input()
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="needs Linux's /proc")
def test_worker_processes_end_with_a_parent_that_is_killed(linked, tmp_path):
    script = tmp_path / "script.py"
    script.write_text(ORPHANED.format(root=linked.root, classes=linked.classes))
    environment = os.environ | {"PYTHONPATH": str(Path(pipeline.__file__).parents[2])}
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    command = [sys.executable, str(script)]
    with subprocess.Popen(command, env=environment, **pipes) as parent:
        assert parent.stdout.readline() == b"ready\n"
        listed = Path(f"/proc/{parent.pid}/task/{parent.pid}/children").read_text()
        parent.kill()
    deadline = time.monotonic() + 60
    while any(Path(f"/proc/{child}").exists() for child in listed.split()):
        assert time.monotonic() < deadline
        time.sleep(0.1)


OPEN_STREAM = """
import sys
from swinsmt_jax.config import DataConfig
from swinsmt_jax.data import pipeline

if __name__ == "__main__":
    config = DataConfig(sys.argv[1], (96, 96, 96), batch_size=2, num_workers=2)
    cases = pipeline.find_cases(config, split="train")
    stream = pipeline.training_batches(config, cases, seed=0)
    next(stream)
    sys.exit(3)
"""


@pytest.mark.slow
def test_a_script_that_ends_with_an_open_stream_leaks_nothing(config, tmp_path):
    (tmp_path / "script.py").write_text(OPEN_STREAM)
    done = subprocess.run(
        [sys.executable, tmp_path / "script.py", config.root],
        **{"capture_output": True, "text": True},
    )
    assert done.returncode == 3
    assert done.stderr == ""
