"""Synthetic whole-body CTs with all 117 structures, in the real dataset's layout.

    python -m swinsmt_jax.data.phantom --root=data/phantoms --cases=24 --spacing=6 \
        --seed=0 [--val=3 --test=5]

writes 24 cases, of which 3 are for validation and 5 for testing. Left and right, and
the numbers of ribs and vertebrae, can be told only from context: one form and one HU
serves them all.
"""

import argparse
import json
import os
import shutil
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import nibabel as nib
import numpy as np
from absl import logging
from scipy import ndimage
from tqdm import tqdm

from swinsmt_jax import checks, labels
from swinsmt_jax.data import nifti, totalsegmentator
from swinsmt_jax.data.anatomy import organs, skeleton
from swinsmt_jax.data.anatomy.canvas import Canvas
from swinsmt_jax.data.anatomy.frame import Painter
from swinsmt_jax.data.anatomy.solids import rotation

VERSION = 1  # raise when the drawing changes: old folders are then refused
MARKER = "phantoms.json"
THINNEST = 0.75  # least radius in voxels of what is drawn

# Fields of view: lower and upper end in mm above the spine's L5/S1, and how often.
REGIONS = {
    "whole": (-225, 735, 0.35),
    "trunk": (-190, 470, 0.25),
    "abdomen": (-185, 290, 0.12),
    "chest": (170, 480, 0.12),
    "pelvis": (-210, 70, 0.08),
    "head": (400, 740, 0.08),
}
WIDTH, DEPTH = 480.0, 360.0  # mm of the largest field of view
ORIENTATIONS = ("RAS", "LPS", "LAS", "RPI")
TISSUES = {
    **{"skin": 20, "fat": -105, "visceral fat": -95, "muscle": 50, "mediastinum": -40},
    **{"cortical": 500, "spongy": 180, "disc": 85, "cartilage": 105, "cord": 30},
    **{"brain": 36, "lung": -810, "gas": -950, "stool": -60, "chyme": 15, "fluid": 8},
    **{"bowel": 38, "adrenal": 25, "prostate": 40, "thyroid": 95},
    **{"foam": -880, "plastic": 60},
}
# Tissues whose HU follow the contrast agent: without, arterial, venous phase.
CONTRAST = {
    "arterial": (42, 320, 150),
    "venous": (42, 70, 150),
    "portal": (42, 85, 165),
    "heart": (42, 210, 135),
    "liver": (56, 66, 110),
    "spleen": (48, 115, 122),
    "kidney": (32, 150, 185),
    "pancreas": (38, 95, 90),
}


def make_phantom(
    seed: int, *, spacing: float, region: str | None = None, variation: float = 1.0
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Draw one body; a pure function of its arguments.

    Args:
        seed: of the body, its posture, contrast phase, field of view and noise.
        spacing: voxel side in mm; structures thinner than the grid are thickened.
        region: one of `REGIONS`; None draws it too. A "whole" body holds all 117
            structures; others may lack gallbladder, prostate and cysts.
        variation: scale of the differences between bodies.

    Returns:
        CT int16 HU [X, Y, Z], labels uint8 [X, Y, Z] and the affine [4, 4], in RAS.
    """
    checks.in_range("spacing", spacing, 0.5, 12.0)
    rng = np.random.default_rng([VERSION, seed])
    share = np.array([r[2] for r in REGIONS.values()])
    drawn = str(rng.choice(list(REGIONS), p=share / share.sum()))
    region = drawn if region is None else region
    checks.one_of("region", region, REGIONS)
    canvas, affine = _grid(rng, spacing, region, variation)
    absent = {"gallbladder": 0.15, "prostate": 0.4}
    absent |= {"kidney_cyst_left": 0.6, "kidney_cyst_right": 0.6}
    absent = {name for name, share in absent.items() if rng.random() < share}
    painter = Painter(
        canvas,
        rng,
        _hounsfield(rng),
        variation,
        thinnest=THINNEST * canvas.voxel,
        absent=frozenset() if region == "whole" else frozenset(absent),
    )
    arms_up = bool(rng.random() < 0.6)
    organs.draw_outline(painter, arms_up=arms_up)
    domes = organs.diaphragm(painter)
    organs.draw_lungs(painter, domes)
    organs.draw_abdomen(painter, domes)
    skeleton.draw_muscles(painter)
    skeleton.draw_head(painter)
    skeleton.draw_pelvis(painter)
    skeleton.draw_shoulders(painter, arms_up=arms_up)
    organs.draw_neck_and_chest(painter)
    skeleton.draw_rib_cage(painter)
    skeleton.draw_spine(painter)
    organs.draw_vessels(painter)
    return _scan(canvas.hu, rng), canvas.labels, affine


def _hounsfield(rng: np.random.Generator) -> dict[str, float]:
    phase = rng.choice(3, p=(0.25, 0.25, 0.5))
    near = np.eye(3)[phase] * 0.8 + rng.dirichlet((1, 1, 1)) * 0.2
    hu = TISSUES | {name: float(near @ values) for name, values in CONTRAST.items()}
    spread = {name: max(4.0, 0.08 * abs(value)) for name, value in hu.items()}
    return {name: value + spread[name] * rng.normal() for name, value in hu.items()}


def _grid(
    rng: np.random.Generator, spacing: float, region: str, variation: float
) -> tuple[Canvas, np.ndarray]:
    """Place an empty grid over a body of random size and posture."""
    scale = np.exp(variation * np.clip(rng.normal(size=3), -2, 2) * (0.05, 0.05, 0.035))
    low, high, _ = REGIONS[region]
    if region != "whole":
        low, high = np.array([low, high]) + variation * rng.uniform(-20, 20, 2)
    sides = np.array([WIDTH, DEPTH, (high - low) * scale[2]])
    if region != "whole":
        sides[:2] -= rng.uniform(0, 60, 2) * (1, 0.7)
    shape = np.maximum(np.rint(sides / spacing), 8).astype(int)
    centre = np.array([0.0, -10.0, (low + high) / 2 * scale[2]])
    centre[:2] += variation * rng.uniform(-8, 8, 2)
    origin = centre - (shape - 1) / 2 * spacing
    step = spacing / scale
    flat = np.stack(
        np.meshgrid(
            *(
                ((o + spacing * np.arange(n)) / s).astype(np.float32)
                for o, n, s in zip(origin, shape, scale, strict=True)
            ),
            indexing="ij",
        )
    )
    places = _bend(flat, rng, variation)
    margin = float(np.abs(places - flat).max())
    affine = np.diag([spacing, spacing, spacing, 1.0])
    affine[:3, 3] = origin + rng.uniform(-200, 200, 3)
    return Canvas(places, origin=origin / scale, step=step, margin=margin), affine


def _bend(flat: np.ndarray, rng: np.random.Generator, variation: float) -> np.ndarray:
    """Turn the body a little about its middle and bend it in smooth waves, in mm."""
    turn = rotation(variation * rng.normal(size=3) * (1.2, 1.2, 2.5)).astype(np.float32)
    middle = np.array([0, 0, 250], np.float32).reshape(3, 1, 1, 1)
    places = np.tensordot(turn, flat - middle, 1) + middle
    waves = []
    for axis in range(3):
        phase, along = rng.uniform(0, 2 * np.pi), flat[(axis + 1) % 3]
        phase_z, height = rng.uniform(0, 2 * np.pi), flat[2]
        wave = 2.5 * np.sin(along / 45 + phase)
        if axis < 2:
            wave = wave + 5 * np.sin(height / 120 + phase_z)
        waves.append(variation * wave)
    return places + np.stack(waves).astype(np.float32)


def _scan(hu: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Blur and noise of the scanner."""
    blurred = ndimage.gaussian_filter(hu, rng.uniform(0.2, 0.45))
    noise = rng.standard_normal(hu.shape, dtype=np.float32) * rng.uniform(6, 24)
    noise = ndimage.gaussian_filter(noise, 0.4)
    return np.clip(np.rint(blurred + noise), -1024, 3071).astype(np.int16)


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
        UserError: for a folder with other content or other arguments.
    """
    root = Path(root)
    for name, count in (("train", train), ("val", val), ("test", test)):
        checks.in_range(name, count, 0, 100_000)
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
    bar = partial(tqdm, total=len(jobs), desc="phantoms", disable=not progress)
    if workers == 1:
        list(bar(map(write, jobs)))
    else:
        with ProcessPoolExecutor(workers, get_context("spawn")) as pool:
            list(bar(pool.map(write, jobs)))
    names = [_name(i) for i in range(len(splits))]
    totalsegmentator.add_to_meta(root, dict(zip(names, splits, strict=True)))


def _claim(root: Path, arguments: dict) -> bool:
    """Mark `root` as ours; return whether it is complete already."""
    marker = root / MARKER
    if root.exists() and (not root.is_dir() or any(root.iterdir())):
        checks.require(
            marker.is_file(),
            f"{root} holds other files than phantoms and is left alone; choose another "
            "--root.",
        )
        found = json.loads(marker.read_text())
        checks.require(
            found == arguments,
            f"{root} holds phantoms made with {found}, but {arguments} was asked for; "
            "remove the folder or choose another --root.",
        )
        return (root / "meta.csv").is_file()
    root.mkdir(parents=True, exist_ok=True)
    marker.write_text(json.dumps(arguments))
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
    partial_folder = root / f".{os.getpid()}.{folder.name}"
    shutil.rmtree(partial_folder, ignore_errors=True)

    def write(name: str, array: np.ndarray) -> None:
        image = nib.Nifti1Image(array, affine)
        wanted = nib.orientations.axcodes2ornt(axes)
        image = image.as_reoriented(
            nib.orientations.ornt_transform(nib.io_orientation(affine), wanted)
        )
        nifti.write(partial_folder / name, np.asarray(image.dataobj), image.affine)

    write("ct.nii.gz", ct)
    if masks:
        for i, name in enumerate(labels.CLASS_NAMES[1:], start=1):
            write(f"segmentations/{name}.nii.gz", (label == i).astype(np.uint8))
    else:
        write("segmentations.nii.gz", label)
    os.replace(partial_folder, folder)


def _name(index: int) -> str:
    return f"s{index + 1:04d}"


def main(argv: Sequence[str] | None = None) -> None:
    """Write a dataset of phantoms from the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--root", required=True, help="folder to write")
    parser.add_argument("--cases", type=int, required=True, help="cases of all splits")
    parser.add_argument("--spacing", type=float, required=True, help="voxel side in mm")
    parser.add_argument("--seed", type=int, required=True)
    parser.add_argument("--val", type=int, default=0, help="of these, for validation")
    parser.add_argument("--test", type=int, default=0, help="of these, for testing")
    parser.add_argument("--variation", type=float, default=1.0)
    parser.add_argument("--masks", action="store_true", help="117 masks per case")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1)
    a = parser.parse_args(argv)
    try:
        checks.in_range("val + test", a.val + a.test, 0, a.cases)
        write_dataset(
            a.root,
            train=a.cases - a.val - a.test,
            val=a.val,
            test=a.test,
            spacing=a.spacing,
            seed=a.seed,
            variation=a.variation,
            masks=a.masks,
            workers=a.workers,
            progress=True,
        )
    except checks.UserError as error:
        parser.exit(1, f"error: {error}\n")


if __name__ == "__main__":
    main()
