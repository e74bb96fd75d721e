"""Each command of docs/own_data.md runs, in order, on data as one's own are."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

ROOT = Path(__file__).resolve().parents[1]
PAGE = (ROOT / "docs" / "own_data.md").read_text()
NAMES = ("liver", "spleen", "aorta")
# Voxel sides in mm and axes of each case: one is thick-sliced, one is not RAS.
GRIDS = [
    ((6, 6, 6), "RAS"),
    ((6, 6, 12), "RAS"),
    ((4, 4, 6), "LPS"),
    ((6, 6, 6), "PIR"),
]


def scan_of(number):
    """Return CT and labels, NIfTI images, of a body of 192 mm with three blocks.

    Only the second case has an aorta.
    """
    sides, axes = GRIDS[number % len(GRIDS)]
    rng, shape = np.random.default_rng(number), [192 // side for side in sides]
    places = np.stack(np.meshgrid(*map(np.arange, shape), indexing="ij"), -1)
    mm = (places + 0.5) * sides
    hu = np.full(shape, -1000, np.int16)
    label = np.zeros(shape, np.uint8)
    body = ((mm > 24) & (mm < 168)).all(-1)
    hu[body] = rng.normal(0, 20, body.sum())
    for k, (left, value) in enumerate(((36, 200), (78, 400), (120, 600)), start=1):
        block = ((mm > [left, 48, 36]) & (mm < [left + 36, 144, 156])).all(-1)
        if k < 3 or number == 1:
            hu[block] += value
            label[block] = k
    affine = np.diag([*sides, 1.0])
    turn = nib.orientations.ornt_transform(
        nib.orientations.axcodes2ornt("RAS"), nib.orientations.axcodes2ornt(axes)
    )
    images = (nib.Nifti1Image(array, affine) for array in (hu, label))
    return [image.as_reoriented(turn) for image in images]


def write_nnunet(root):
    for number in range(6):
        part = "Ts" if number == 5 else "Tr"
        for folder, end, image in zip(
            ("images", "labels"), ("_0000", ""), scan_of(number), strict=True
        ):
            (root / f"{folder}{part}").mkdir(parents=True, exist_ok=True)
            nib.save(image, root / f"{folder}{part}" / f"p{number}{end}.nii.gz")
    labels = {"background": 0} | {name: k for k, name in enumerate(NAMES, start=1)}
    content = {"channel_names": {"0": "CT"}, "labels": labels, "numTraining": 5}
    (root / "dataset.json").write_text(json.dumps(content | {"file_ending": ".nii.gz"}))


def write_files(root):
    for folder in ("images", "labels"):
        (root / folder).mkdir(parents=True)
    for number in range(1, 6):
        for folder, image in zip(("images", "labels"), scan_of(number), strict=True):
            nib.save(image, root / folder / f"p{number}.nii.gz")


def write_masks(root):
    for number in range(1, 7):
        (root / f"p{number}").mkdir(parents=True)
        ct, label = scan_of(number)
        nib.save(ct, root / f"p{number}" / "ct.nii.gz")
        ids = np.asarray(label.dataobj)
        for k in set(ids.flat) - {0}:
            mask = nib.Nifti1Image((ids == k).astype(np.uint8), label.affine)
            nib.save(mask, root / f"p{number}" / f"{NAMES[k - 1]}.nii.gz")


@pytest.fixture(scope="module")
def walked(tmp_path_factory):
    """The folder in which all commands ran, and what each block of them said."""
    folder = tmp_path_factory.mktemp("own")
    for name in ("preprocess", "train", "evaluate", "predict"):
        (folder / f"{name}.py").symlink_to(ROOT / f"{name}.py")
    (folder / "configs").symlink_to(ROOT / "configs")
    write_nnunet(folder / "data" / "abdomen")
    write_files(folder / "data" / "thick")
    write_masks(folder / "data" / "masks")
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    environment = os.environ | {"PATH": path, "JAX_PLATFORMS": "cpu"}
    environment["PYTHONPATH"] = f"{folder}:{ROOT}"
    said = []
    for block in re.findall(r"^```sh\n(.*?)^```", PAGE, re.DOTALL | re.MULTILINE):
        assert len(re.findall("^(?:python|swinsmt) ", block, re.MULTILINE)) <= 12
        done = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", block],
            **{"cwd": folder, "env": environment, "capture_output": True, "text": True},
        )
        assert done.returncode == 0, done.stderr[-3000:]
        said.append(done.stdout + done.stderr)
    return folder, said


def dice(folder):
    return json.loads((folder / "results.json").read_text())["dice"]["overall"]


@pytest.mark.slow
def test_the_page_runs_and_says_what_happens(walked):
    folder, (_, abdomen, thick, masks, merged) = walked
    assert "6 cases are made: p0, p1, p2, p3, p4, p5" in abdomen
    scans, files = (
        dice(folder / f"runs/abdomen/{name}") for name in ("scans", "files")
    )
    assert scans == files
    assert re.search(r"^overall .* \+0\.00 ", abdomen, re.MULTILINE)
    assert "num_steps grows from 20 to 30: the learning rate stays" in thick
    assert "masks of 5 cases are missing and count as absent" in masks
    assert re.search(r"^mean \+- deviation +2 ", masks, re.MULTILINE)
    assert "liver: annotated in 6 cases" in merged
    assert "aorta: annotated in 6 cases" in merged
    config = json.loads((folder / "runs/thick/config.json").read_text())
    assert config["data"]["spacing"] == [6, 6, 12]
    assert config["data"]["classes"] == list(NAMES)
    found = nib.load(folder / "out/thick/p2.nii.gz")
    scan = nib.load(folder / "data/thick/images/p2.nii.gz")
    assert nib.aff2axcodes(scan.affine) == ("L", "P", "S")
    np.testing.assert_allclose(found.affine, scan.affine)
    about = json.loads((folder / "out/masks/summary.json").read_text())["p6"]
    assert about["run"] == f"{folder}/runs/fold0,{folder}/runs/fold1"
