"""Time and peak memory of a prediction compared with nnU-Net, on one scan and CPU.

    python -m benchmarks.nnunet [--quick] [--folder=MODEL] [--side=200] [--json=FILE]

Each runs in a separate process, from file to file: one fold, no mirroring. An uncounted
run compiles the programs first. Needs nnunetv2 (extra "reference").
Times are of whole processes, so imports count. Without --folder a plain U-Net with
random weights and six classes is used.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import nibabel as nib
import numpy as np
from absl import flags

from benchmarks import markdown_table, run, save, show

OURS = """
import sys
from swinsmt_jax import load_nnunet, save
folder, scan, output = sys.argv[1:]
labels = load_nnunet(folder, folds=["0"], mirror=False).segment(scan)
save(output, labels, like=scan)
"""
THEIRS = """
import sys
import torch
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
folder, scan, output = sys.argv[1:]
torch.set_num_threads(len(__import__("os").sched_getaffinity(0)))
predictor = nnUNetPredictor(
    device=torch.device("cpu"), use_mirroring=False, allow_tqdm=False
)
predictor.initialize_from_trained_model_folder(folder, (0,))
predictor.predict_from_files_sequential([[scan]], [output.removesuffix(".nii.gz")])
"""

# Of this program alone; the largest memory that wait4 knows counts its parent's too.
PEAK = """
print(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")))
"""


def random_model(root: Path) -> Path:
    """Write a model folder with random weights."""
    from flax import nnx

    from swinsmt_jax import models
    from swinsmt_jax.convert import nnunet_writer
    from swinsmt_jax.models.nnunet import PlainConvUNetConfig

    config = PlainConvUNetConfig(
        in_channels=1,
        out_channels=7,
        features_per_stage=(16, 32, 64, 128),
        strides=(1, 2, 2, 2),
    )
    return nnunet_writer.write(
        root / "Dataset001_Random",
        models.create(config, rngs=nnx.Rngs(0)),
        patch_shape=(96, 96, 96),
        spacing=(1.5, 1.5, 1.5),
        batch_size=2,
        clip=(-1000, 1000),
        mean=0.0,
        std=500.0,
        names=("background", *(f"class_{i}" for i in range(1, 7))),
    )


def make_scan(path: Path, folder: Path, side: int) -> None:
    """Write a phantom of side^3 voxels at the network's spacing."""
    plans = json.loads((folder / "plans.json").read_text())
    spacing = plans["configurations"]["3d_fullres"]["spacing"][::-1]
    places = np.indices((side,) * 3, np.float32) / side - 0.5
    body = np.sqrt((places**2).sum(0)) < 0.45
    hu = np.where(body, 200 * np.sin(20 * places).sum(0), -1000).astype(np.int16)
    nib.save(nib.Nifti1Image(hu, np.diag([*spacing, 1.0])), path)


def measure(program: str, *arguments: object) -> dict[str, float]:
    """Run a Python program in a process of its own; return its seconds and peak MB."""
    start = time.perf_counter()
    command = [sys.executable, "-c", program + PEAK, *map(str, arguments)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    seconds = time.perf_counter() - start
    if done.returncode:
        sys.exit(f"a run ended with status {done.returncode}")
    return {"seconds": seconds, "peak_mb": int(done.stdout.split()[-2]) / 1024}


def main(options: flags.FlagValues) -> None:
    """Measure both, print the table and write the report."""
    side = 64 if options.quick else options.side
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(root / "cache"))
        os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
        for name in ("raw", "preprocessed", "results"):  # nnU-Net warns without them
            os.environ.setdefault(f"nnUNet_{name}", str(root))
        model = Path(options.folder) if options.folder else random_model(root)
        scan, files = root / "scan_0000.nii.gz", (root / "a.nii.gz", root / "b.nii.gz")
        make_scan(scan, model, side)
        measure(OURS, model, scan, files[0])
        rows = {
            "swinsmt_jax": measure(OURS, model, scan, files[0]),
            "nnunetv2": measure(THEIRS, model, scan, files[1]),
        }
        ours, theirs = (np.asarray(nib.load(file).dataobj) for file in files)
    lines = [
        (name, f"{row['seconds']:.1f}", f"{row['peak_mb']:,.0f}")
        for name, row in rows.items()
    ]
    print(markdown_table((f"{side}³ voxels", "seconds", "peak MB"), lines))
    own, other = rows.values()
    headline = {f"ratio_of_{key}": own[key] / other[key] for key in own}
    headline["equal_labels"] = float(np.mean(ours == theirs))
    show(headline)
    save(headline, rows=rows)


if __name__ == "__main__":
    flags.DEFINE_string("folder", None, "model folder of nnU-Net")
    flags.DEFINE_integer("side", 200, "voxels a side of the scan")
    run(main, quick="a scan of 64 voxels a side")
