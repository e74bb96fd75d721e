"""Synthetic whole-body CTs with all 117 structures, in the real dataset's layout.

    python -m swinsmt_jax.phantoms --root=data/phantoms --cases=24 --spacing=6 \
        --seed=0 [--val=3 --test=5]

writes 24 cases, of which 3 are for validation and 5 for testing. Left and right, and
the numbers of ribs and vertebrae, can be told only from context: one form and one HU
serves them all.
"""

import argparse
import os
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import nibabel as nib
import numpy as np
from absl import logging
from tqdm import tqdm

from swinsmt_jax import checks, labels
from swinsmt_jax.data import meta, nifti
from swinsmt_jax.phantoms.body import SPACING, VERSION, make_phantom
from swinsmt_jax.runtime import files
from swinsmt_jax.runtime.workers import run_each

MARKER = "phantoms.json"
MAX_VARIATION, MAX_SEED = 5, 10**9
ORIENTATIONS = ("RAS", "LPS", "LAS", "RPI")  # of the files, in turn


def write_dataset(
    root: str | Path,
    *,
    train: int,
    val: int,
    test: int,
    spacing: float,
    seed: int,
    variation: float = 1.0,
    masks: bool = False,
    workers: int = 1,
    progress: bool = False,
) -> None:
    """Write phantoms in the TotalSegmentator-V2 layout.

    A folder made with equal arguments is left as it is; an interrupted one is
    completed. The validation and test cases are whole bodies and fields of view in
    turn, so that every class can be scored.

    Args:
        root: a new folder, or one written here before.
        train: number of training cases.
        val: number of validation cases.
        test: number of test cases.
        spacing: voxel side in mm.
        seed: of the whole set; its cases differ.
        variation: scale of the differences between bodies.
        masks: 117 binary masks per case, as downloaded, instead of the one label file.
        workers: processes.
        progress: show a progress bar.

    Raises:
        UserError: for numbers out of range, and a folder with other content, with
            phantoms of other arguments, or that cannot be written.
    """
    root = files.absolute(root)
    for name, count in (("train", train), ("val", val), ("test", test)):
        checks.in_range(name, count, 0, 100_000)
    checks.in_range("spacing", spacing, *SPACING)
    checks.in_range("variation", variation, 0, MAX_VARIATION)
    checks.in_range("seed", seed, 0, MAX_SEED)
    checks.positive("workers", workers)
    splits = ["train"] * train + ["val"] * val + ["test"] * test
    checks.positive("the number of cases", len(splits))
    arguments = {
        **{"version": VERSION, "train": train, "val": val, "test": test},
        **{"spacing": float(spacing), "seed": seed, "variation": float(variation)},
        "masks": masks,
    }
    if _claim(root, arguments):
        logging.info("%s already holds these phantoms.", root)
        return
    jobs = []
    for i, split in enumerate(splits):
        whole = split != "train" and (i - splits.index(split)) % 2 == 0
        jobs.append((i, "whole" if whole else None))
    draw = partial(make_phantom, spacing=spacing, variation=variation)
    write = partial(_write_case, root, draw=draw, seed=seed, masks=masks)
    drawn = run_each(write, jobs, workers=workers)
    for _, future in tqdm(drawn, "phantoms", len(jobs), disable=not progress):
        future.result()
    names = [_name(i) for i in range(len(splits))]
    meta.add(root, dict(zip(names, splits, strict=True)))


def _claim(root: Path, arguments: dict) -> bool:
    """Mark `root` as ours; return whether it is complete already."""
    marker = root / MARKER
    if root.exists() and (not root.is_dir() or any(root.iterdir())):
        checks.require(
            marker.is_file(),
            f"{root} holds other files than phantoms and is left alone; choose another "
            "--root.",
        )
        try:
            found = files.read_json(marker)
        except ValueError as error:
            raise checks.UserError(f"{marker} is not JSON: {error}.") from error
        checks.require(
            found == arguments,
            f"{root} holds phantoms made with {found}, but {arguments} was requested; "
            "remove the folder or choose another --root.",
        )
        files.remove_partial(root)
        return (root / "meta.csv").is_file()
    root.mkdir(parents=True, exist_ok=True)
    files.write_json(marker, arguments)
    return False


def _write_case(
    root: Path, job: tuple[int, str | None], *, draw: Callable, seed: int, masks: bool
) -> None:
    index, region = job
    folder = root / _name(index)
    if folder.exists():
        return
    ct, label, affine = draw(100_003 * seed + index, region=region)
    axes = ORIENTATIONS[index % len(ORIENTATIONS)]

    def write(path: Path, array: np.ndarray) -> None:
        image = nib.Nifti1Image(array, affine)
        wanted = nib.orientations.axcodes2ornt(axes)
        image = image.as_reoriented(
            nib.orientations.ornt_transform(nib.io_orientation(affine), wanted)
        )
        nifti.write(path, np.asarray(image.dataobj), image.affine)

    with files.replacing(folder) as partial_folder:
        write(partial_folder / "ct.nii.gz", ct)
        if masks:
            for i, name in enumerate(labels.CLASS_NAMES[1:], start=1):
                mask = (label == i).astype(np.uint8)
                write(partial_folder / "segmentations" / f"{name}.nii.gz", mask)
        else:
            write(partial_folder / "segmentations.nii.gz", label)


def _name(index: int) -> str:
    return f"s{index + 1:04d}"


def main(argv: Sequence[str] | None = None) -> None:
    """Write a dataset of phantoms from the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--root", required=True, help="folder to write")
    parser.add_argument("--cases", type=int, required=True, help="cases of all splits")
    parser.add_argument("--spacing", type=float, required=True, help="voxel side in mm")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--val", type=int, default=0, help="of these, for validation")
    parser.add_argument("--test", type=int, default=0, help="of these, for testing")
    parser.add_argument("--variation", type=float, default=1.0)
    parser.add_argument("--masks", action="store_true", help="117 masks per case")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1)
    options = vars(parser.parse_args(argv))
    cases, held_out = options.pop("cases"), options["val"] + options["test"]
    try:
        checks.in_range("val + test", held_out, 0, cases)
        write_dataset(**options, train=cases - held_out, progress=True)
    except checks.UserError as error:
        parser.exit(2, f"error: {error}\n")
    except OSError as error:
        parser.exit(
            2,
            f"error: {options['root']} cannot be written: {error}; fix its "
            "permissions, make room, or choose another --root.\n",
        )
