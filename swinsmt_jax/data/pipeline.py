"""From cases on disk to training batches (grain) and to whole volumes.

The stream of crops is a pure function of (seed, position), because shuffling and
augmentation are seeded per record. So it does not depend on the number of threads,
workers or processes. A resumed run starts at its step without replaying earlier ones.
"""

import atexit
import functools
import hashlib
import os
import sys
import threading
import weakref
from collections.abc import Generator, Sequence
from dataclasses import replace
from pathlib import Path

import grain
import numpy as np
from absl import flags, logging

from swinsmt_jax import checks
from swinsmt_jax.class_map import V2, VERSIONS, ClassMap
from swinsmt_jax.config import DataConfig, Seen
from swinsmt_jax.data import augmentation, store, transforms
from swinsmt_jax.data.case import Case, lost_note, resampled
from swinsmt_jax.data.dataset import find_cases as find_in_dataset
from swinsmt_jax.data.dataset import open_dataset
from swinsmt_jax.data.sample import Sample
from swinsmt_jax.data.spacing import text
from swinsmt_jax.data.store import StoredCase
from swinsmt_jax.data.voxels import normalizing
from swinsmt_jax.runtime import files
from swinsmt_jax.runtime.workers import end_with

Cases = Sequence[Case] | Sequence[StoredCase]
USUAL = 20  # cases from which on percentiles of a volume are known
_OPEN: weakref.WeakSet[Generator] = weakref.WeakSet()
WORKER_BUFFER = 2  # crops that each worker process holds ready


def training_batches(
    config: DataConfig,
    cases: Cases,
    *,
    seed: int,
    start_step: int = 0,
    ahead: int = 0,
    process_index: int = 0,
    process_count: int = 1,
) -> Generator[dict[str, np.ndarray], None, None]:
    """Yield an endless stream of augmented crops, beginning at `start_step`.

    If a run had another batch size before, its steps took `ahead` crops more than
    `start_step` batches. Every case comes once per epoch, in a new order. Process i of
    n takes the crops i, i + n, ... of each step's batch. So the batches of processes
    are disjoint, and together equal those of a single process. Call `close()` when
    done.

    Returns:
        An iterator of dictionaries: `image` float32 [b, D, H, W, 1], `label` uint8
        [b, D, H, W], and `case` int32 [b], the index into `cases`; with
        b = batch_size / process_count. If a case annotates only some classes or
        voxels, also `annotated` bool [b, K].

    Raises:
        UserError: without cases, for a batch that the processes do not divide,
            mirroring of classes without a counterpart, and bad files when their turn
            comes.
    """
    checks.require(
        len(cases) > 0, "training needs at least one case, but `cases` is empty."
    )
    checks.require(
        config.batch_size % process_count == 0,
        f"data.batch_size is {config.batch_size}, but must be a multiple of the "
        f"{process_count} processes that share it.",
    )
    checks.in_range("process_index", process_index, 0, process_count - 1)
    if not flags.FLAGS.is_parsed():  # grain's workers read absl flags
        flags.FLAGS.mark_as_parsed()
    first = start_step * config.batch_size + ahead + process_index
    crops = (
        grain.MapDataset.range(len(cases))
        .seed(seed)
        .shuffle()
        .repeat()
        .random_map(_RandomCrop(config, cases))[first::process_count]
    )
    reading = grain.ReadOptions(
        num_threads=config.num_threads,
        prefetch_buffer_size=2 * config.num_threads,
    )
    crops = crops.to_iter_dataset(reading)
    if config.num_workers:
        workers = grain.MultiprocessingOptions(
            num_workers=config.num_workers, per_worker_buffer_size=WORKER_BUFFER
        )
        start = functools.partial(_start_worker, parent=os.getpid())
        crops = crops.mp_prefetch(workers, worker_init_fn=start)
    # Batches are formed after the workers: before them, records were lost
    # (google/grain#1129) and the stream would depend on the number of workers.
    batches = crops.batch(config.batch_size // process_count, drop_remainder=True)
    stream = _batches(iter(batches))
    _OPEN.add(stream)
    return stream


@atexit.register
def _close_streams():
    """Close streams that a script left open, before shared worker memory leaks."""
    for stream in list(_OPEN):
        stream.close()


def _start_worker(worker: int, workers: int, *, parent: int) -> None:
    """Let a worker end with its parent, and prevent it from taking an accelerator.

    JAX may already be loaded: a worker imports the training script.
    """
    end_with(parent)
    os.environ["JAX_PLATFORMS"] = "cpu"
    if "jax" in sys.modules:
        sys.modules["jax"].config.update("jax_platforms", "cpu")


def _batches(iterator: grain.DatasetIterator) -> Generator[dict, None, None]:
    try:
        yield from iterator
    except RuntimeError as error:
        if "Worker process was terminated" not in str(error):
            raise
        raise checks.UserError(
            f"a process that reads data has died ({str(error).splitlines()[0]}). Exit "
            "code -9 means that it was killed, mostly because memory ran out: lower "
            "data.num_workers or switch data.cache off, and give the same command "
            "again."
        ) from error
    finally:
        iterator.close()


def find_cases(config: DataConfig, *, split: str) -> Cases:
    """List the cases of a split; see `open_data`."""
    cases, _ = open_data(
        config.root,
        split=split,
        description=config.description,
        fold=config.fold,
        modality=config.modality,
    )
    return cases


def open_data(
    root: str | Path,
    *,
    split: str,
    description: str = "",
    fold: int = -1,
    modality: str = "CT",
) -> tuple[Cases, ClassMap]:
    """Return the cases of a split and the classes of a dataset or a store.

    A `modality` other than CT overrides that of a dataset.

    Raises:
        UserError: as `dataset.find_cases` and `store.find_cases`.
    """
    folder = _existing(root)
    if store.is_store(folder):
        stored = store.find_cases(folder, split=split, fold=fold)
        return stored, store.read_options(folder).classes
    cases = find_in_dataset(folder, split=split, description=description, fold=fold)
    if modality != "CT":
        cases = tuple(replace(case, modality=modality) for case in cases)
    return cases, cases[0].classes


def class_map(config: DataConfig) -> ClassMap:
    """Return the classes of a store or a dataset."""
    root = _existing(config.root)
    if store.is_store(root):
        return store.read_options(root).classes
    return open_dataset(root, description=config.description).classes


def _existing(root):
    """Return the folder of the data as an existing path."""
    given, root = root, files.absolute(root)
    checks.require(
        root.is_dir(),
        f"data folder {root} does not exist"
        + ("" if Path(given).is_absolute() else ", relative to where this was started")
        + "; give the folder of a dataset or of a store as data.root (evaluate.py: "
        "--data_root). Phantoms: python -m swinsmt_jax.phantoms --root=FOLDER",
    )
    return root


def settled(config: DataConfig, *, num_classes: int) -> DataConfig:
    """Return the config with spacing and classes from its data, and absolute paths.

    Raises:
        UserError: for a config that contradicts them, and if `num_classes`, with the
            background, is not the data's number.
    """
    root, classes = _existing(config.root), class_map(config)
    spacing, names = config.spacing, classes.names[1:]
    if store.is_store(root):
        spacing = store.read_options(root).spacing
        checks.require(
            config.spacing == 0.0 or text(config.spacing) == text(spacing),
            f"data.spacing is {text(config.spacing)}, but the store {root} was made "
            f"with --spacing={text(spacing)}; set data.spacing=0, which takes the "
            "store's, or preprocess again with another --store.",
        )
    checks.require(
        config.classes in ((), names),
        f"data.classes are {checks.few(config.classes)}, but {root} has "
        f"{checks.few(names)}; leave data.classes out, which takes the data's, or give "
        "other data.",
    )
    odd = (
        classes.names == V2.names
        and not config.classes
        and num_classes != V2.num_classes
    )
    checks.require(
        odd or num_classes == len(names) + 1,
        f"model.out_channels is {num_classes}, but must be {len(names) + 1}: {root} "
        f"has the background and the classes {checks.few(names)}.",
    )
    description = config.description
    if description and description not in VERSIONS:
        description = str(files.absolute(description))
    return replace(
        config,
        root=str(root),
        description=description,
        spacing=spacing,
        classes=() if odd else names,
    )


def recalled(config: DataConfig) -> DataConfig:
    """Return the config of a finished training with the spacing that it used.

    Earlier versions took the spacing of a store in training without recording it.
    """
    if config.seen.fingerprint or config.spacing or not store.is_store(config.root):
        return config
    spacing = store.read_options(Path(config.root)).spacing
    if spacing:
        logging.warning(
            "the run does not record its spacing; its store %s has voxels of %s mm, "
            "which are used",
            config.root,
            text(spacing),
        )
    return replace(config, spacing=spacing)


def seen(config: DataConfig, cases: Cases, *, groups: ClassMap) -> Seen:
    """Return the facts of training cases that a network keeps, of a settled config."""
    sides = [case.sides for case in cases] if config.spacing == 0 else []
    return Seen(
        fingerprint(cases),
        tuple(np.min(sides, axis=0).round(4).tolist()) if sides else (),
        tuple(np.max(sides, axis=0).round(4).tolist()) if sides else (),
        groups.names_by_group(),
        usual_ml(cases, groups.names),
    )


def usual_ml(cases: Sequence, names: Sequence[str]) -> dict[str, tuple[float, float]]:
    """Return {class: (1st, 99th percentile of its volume in ml)} from stored cases.

    It covers the classes that at least `USUAL` cases have whole; structures cut by
    their scan do not count. Cases that are not from a store give {}.

    Args:
        cases: of the training.
        names: of the label ids.
    """
    found: dict[str, list[float]] = {}
    for case in cases if all(isinstance(c, StoredCase) for c in cases) else ():
        facts = case.facts
        voxel = abs(float(np.linalg.det(np.array(facts["affine"])[:3, :3]))) / 1000
        for number, count in enumerate(facts["counts"]):
            if number and count and number not in facts.get("cut", ()):
                found.setdefault(names[number], []).append(count * voxel)
    return {
        name: tuple(np.percentile(own, (1, 99)).round(3).tolist())
        for name, own in found.items()
        if len(own) >= USUAL
    }


def groups_of(config: DataConfig) -> dict[str, tuple[int, ...]]:
    """Return the groups of a network's label ids, as in its training data."""
    ids = {name: i for i, name in enumerate(config.class_names)}
    found = config.seen.groups.items()
    if not found and not config.classes:
        return dict(V2.groups)
    return {g: tuple(ids[name] for name in own if name in ids) for g, own in found}


def _names_of(config):
    return class_map(config).names


def load_foreground(config: DataConfig, case: Case | StoredCase) -> Sample:
    """Read a case, resampled and cropped to its foreground, in Hounsfield units."""
    sample = resampled(case.read(), config.spacing)
    return transforms.crop_foreground(sample, air=config.hu_range[0])


def fingerprint(cases: Cases, *, whole: bool = False) -> str:
    """Return a hash of the cases' ids, splits, order and facts of their files.

    With `whole` it includes the ends of voxel files, where gzip has its checksum and a
    store its index.
    """
    digest = hashlib.sha256()
    for case in cases:
        digest.update(f"{case.name};{case.split};{case.facts}\n".encode())
        if whole:
            own = case.shards if isinstance(case, StoredCase) else case.files
            for file in own:
                digest.update(files.end_of(file))
    return digest.hexdigest()[:16]


class _RandomCrop(grain.transforms.RandomMap):
    """Index of a case -> one augmented crop; keeps decoded cases if configured."""

    def __init__(self, config: DataConfig, cases: Cases):
        self._config = config
        self._cases = cases
        self._partial = any(case.is_partial for case in cases)
        self._start()

    def _start(self) -> None:
        named = self._config.classes
        self._names = self._config.class_names if named else _names_of(self._config)
        if self._config.augmentations.mirror.probability:
            augmentation.left_right_swap(self._names)  # refuse before the first crop
        self._memory: dict[int, Sample] = {}
        self._told: set[int] = set()  # cases whose lost classes the log has
        self._locks = [threading.Lock() for _ in self._cases]

    def __getstate__(self) -> dict:  # workers start with an empty memory
        names = "config", "cases", "partial"
        return {name: getattr(self, f"_{name}") for name in names}

    def __setstate__(self, state: dict) -> None:
        self._config, self._cases = state["config"], state["cases"]
        self._partial = state["partial"]
        self._start()

    def random_map(self, element: int, rng: np.random.Generator) -> dict:
        config, case = self._config, self._cases[element]
        seed = int(rng.integers(2**63))
        sample = transforms.balanced_crop(
            case if isinstance(case, StoredCase) else self._sample(element),
            augmentation.generator(seed, "crop"),
            shape=augmentation.region(config.augmentations, seed, config.patch_shape),
            foreground_ratio=config.foreground_ratio,
            air=config.hu_range[0],
        )
        sample = transforms.enlarge(sample, shape=config.patch_shape)
        sample = transforms.scale_hu(sample, hu_range=config.hu_range)
        sample = augmentation.augment(config.augmentations, seed, sample, self._names)
        scale, air = normalizing(config.hu_range, config.normalization)
        image = sample.image * scale + air if config.normalization else sample.image
        crop = {
            "image": np.ascontiguousarray(image[..., None], np.float32),
            "label": np.ascontiguousarray(sample.label),
            "case": np.int32(element),
        }
        if self._partial:
            crop["annotated"] = sample.annotated_mask(len(self._names))
        return crop

    def _sample(self, index: int) -> Sample:
        if not self._config.cache:
            return self._load(index)
        with self._locks[index]:  # two threads never decode one case twice
            if index not in self._memory:
                self._memory[index] = self._load(index)
            return self._memory[index]

    def _load(self, index: int) -> Sample:
        sample = load_foreground(self._config, self._cases[index])
        lost = {} if index in self._told else sample.lost(self._names)
        self._told.add(index)
        if lost:
            logging.warning("%s", lost_note(sample.name, lost))
        return sample
