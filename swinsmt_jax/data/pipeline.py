"""From cases on disk to training batches (grain) and to whole volumes.

The stream of crops is a pure function of (seed, position): shuffling and augmentation
are seeded per record. So it does not depend on the number of threads, workers or
processes, and a resumed run starts at its step without replaying what came before.
"""

import functools
import hashlib
import os
import sys
import threading
from collections.abc import Generator, Sequence
from dataclasses import replace
from pathlib import Path

import grain
import numpy as np
from absl import flags, logging

from swinsmt_jax import checks
from swinsmt_jax.class_map import V2, ClassMap
from swinsmt_jax.config import DataConfig
from swinsmt_jax.data import augmentation, store, transforms
from swinsmt_jax.data.case import Case, lost_note, resampled
from swinsmt_jax.data.dataset import require_totalsegmentator
from swinsmt_jax.data.layouts import totalsegmentator
from swinsmt_jax.data.sample import Sample
from swinsmt_jax.data.store import StoredCase
from swinsmt_jax.data.voxels import normalizing
from swinsmt_jax.runtime.workers import end_with

Cases = Sequence[Case] | Sequence[StoredCase]
WORKER_BUFFER = 2  # crops that each worker process holds ready


def training_batches(
    config: DataConfig,
    cases: Cases,
    *,
    seed: int,
    start_step: int = 0,
    process_index: int = 0,
    process_count: int = 1,
) -> Generator[dict[str, np.ndarray], None, None]:
    """Yield an endless stream of augmented crops, beginning with that of `start_step`.

    Every case comes once per epoch, in a new order. Process i of n takes the crops i,
    i + n, ... of each step's batch, so the processes' batches are disjoint and together
    those of a single process. Call `close()` when done.

    Returns:
        An iterator of dictionaries: `image` float32 [b, D, H, W, 1], `label` uint8
        [b, D, H, W], and `case` int32 [b], the index into `cases`; with
        b = batch_size / process_count.

    Raises:
        UserError: for no cases, a batch that the processes do not divide, mirroring of
            classes that lack a counterpart, and bad files when their turn comes.
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
    first = start_step * config.batch_size + process_index
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
    return _batches(iter(batches))


def _start_worker(worker: int, workers: int, *, parent: int) -> None:
    """Let a worker end with its parent, and keep it from taking an accelerator.

    JAX may be loaded already: a worker imports the script that trains.
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
    """List the cases of a split of a dataset or of a store.

    Raises:
        UserError: as `totalsegmentator.find_cases` and `store.find_cases`, and for a
            store of another spacing or other classes than the config's.
    """
    found = class_map(config)
    checks.require(
        config.classes in (_own_names(found), found.names[1:]),
        f"{config.root} has the classes {_few(found.names[1:])}, but the network is "
        f"for {_few(config.classes or V2.names[1:])}; give data with its classes.",
    )
    if not store.is_store(config.root):
        require_totalsegmentator(config.root)
        found_cases = totalsegmentator.find_cases(config.root, split=split)
        return tuple(replace(case, modality=config.modality) for case in found_cases)
    cases = store.find_cases(config.root, split=split)
    spacing = store.read_options(Path(config.root)).spacing
    checks.require(
        config.spacing in (0.0, spacing),
        f"data.spacing is {config.spacing:g}, but the store {config.root} was made "
        f"with --spacing={spacing:g}; take that, or preprocess again with another "
        "--store.",
    )
    return cases


def class_map(config: DataConfig) -> ClassMap:
    """Return the classes of a store; of a dataset, TotalSegmentator v2's."""
    if store.is_store(config.root):
        return store.read_options(Path(config.root)).classes
    return V2


def with_classes(config: DataConfig, *, num_classes: int) -> DataConfig:
    """Return the config with the names of its store's classes, if they are not v2's.

    Raises:
        UserError: if `num_classes`, background included, is not the number of these.
    """
    if not config.classes:
        config = replace(config, classes=_own_names(class_map(config)))
    wanted = len(config.classes) + 1
    checks.require(
        not config.classes or num_classes == wanted,
        f"model.out_channels is {num_classes}, but must be {wanted}: the store "
        f"{config.root} has the background and the classes "
        f"{_few(config.classes)}.",
    )
    return config


def _own_names(classes: ClassMap) -> tuple[str, ...]:
    return () if classes.names == V2.names else classes.names[1:]


def _few(names: Sequence[str]) -> str:
    return f"{', '.join(names[:4])}{', ...' if len(names) > 4 else ''} ({len(names)})"


def load_foreground(config: DataConfig, case: Case | StoredCase) -> Sample:
    """Read a case resampled and cropped to its foreground, in Hounsfield units."""
    sample = resampled(case.read(), config.spacing)
    return transforms.crop_foreground(sample, air=config.hu_range[0])


def fingerprint(cases: Cases) -> str:
    """Return a hash of the cases' ids, splits, order and what their files say."""
    digest = hashlib.sha256()
    for case in cases:
        digest.update(f"{case.name};{case.split};{case.facts}\n".encode())
    return digest.hexdigest()[:16]


class _RandomCrop(grain.transforms.RandomMap):
    """Index of a case -> one augmented crop; keeps decoded cases if so configured."""

    def __init__(self, config: DataConfig, cases: Cases):
        self._config = config
        self._cases = cases
        self._start()

    def _start(self) -> None:
        self._names = class_map(self._config).names
        if self._config.augmentations.mirror.probability:
            augmentation.left_right_swap(self._names)  # refuse before the first crop
        self._memory: dict[int, Sample] = {}
        self._told: set[int] = set()  # cases whose lost classes the log has
        self._locks = [threading.Lock() for _ in self._cases]

    def __getstate__(self) -> dict:  # workers start with an empty memory
        return {"config": self._config, "cases": self._cases}

    def __setstate__(self, state: dict) -> None:
        self._config, self._cases = state["config"], state["cases"]
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
        return {
            "image": np.ascontiguousarray(image[..., None], np.float32),
            "label": np.ascontiguousarray(sample.label),
            "case": np.int32(element),
        }

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
