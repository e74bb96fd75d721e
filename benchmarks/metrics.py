"""Seconds to score a whole-body case: Dice and surface Dice of 117 structures.

    python -m benchmarks.metrics [--quick] [--json=FILE]

Truth is a phantom's label map at 1.5 mm, prediction the same moved by a voxel along
each axis. Fastest of the runs. --quick takes voxels of 6 mm, once.
"""

import json
import tempfile
import time
from pathlib import Path

import numpy as np
from absl import app, flags

from benchmarks import define_file, report, write
from swinsmt_jax.class_map import V2
from swinsmt_jax.data.case import load_case
from swinsmt_jax.data.layouts import totalsegmentator
from swinsmt_jax.evaluation import metrics
from swinsmt_jax.evaluation.surface import surface_dice
from swinsmt_jax.phantoms import dataset as phantom


def seconds(function, repeats):
    """Return the seconds of the fastest run."""
    found = []
    for _ in range(repeats):
        start = time.perf_counter()
        function()
        found.append(time.perf_counter() - start)
    return min(found)


def main(_):
    quick = flags.FLAGS.quick
    spacing, repeats = (6.0, 1) if quick else (1.5, 3)
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder) / "phantoms"
        phantom.write_dataset(root, train=1, val=0, test=0, spacing=spacing, seed=0)
        (case,) = totalsegmentator.find_cases(root, split="train")
        truth = load_case(case).label
    prediction = np.roll(truth, (1, 1, 1), axis=(0, 1, 2))
    classes = len(V2.names)

    def dice():
        metrics.dice(metrics.overlap_counts(prediction, truth, num_classes=classes))

    def surface():
        surface_dice(prediction, truth, spacing=(spacing,) * 3, num_classes=classes)

    headline = {
        "voxels": truth.size,
        "structures": len(np.unique(truth)) - 1,
        "dice_s": seconds(dice, repeats),
        "surface_dice_s": seconds(surface, repeats),
    }
    for name in ("dice_s", "surface_dice_s"):
        headline[f"{name}_per_20_million"] = headline[name] * 20e6 / truth.size
    print(json.dumps(headline, indent=1))
    write(flags.FLAGS.json, report(headline))


if __name__ == "__main__":
    flags.DEFINE_bool("quick", False, "voxels of 6 mm, once")
    define_file("json", "also write the figures to this file")
    app.run(main)
