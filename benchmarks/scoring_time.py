"""Seconds to score a whole-body case; see `benchmarks.input_pipeline`."""

import tempfile
from pathlib import Path

import numpy as np

from benchmarks import save, show
from swinsmt_jax.class_map import V2
from swinsmt_jax.data.case import load_case
from swinsmt_jax.data.layouts import totalsegmentator
from swinsmt_jax.evaluation import metrics
from swinsmt_jax.evaluation.surface import surface_dice
from swinsmt_jax.phantoms import dataset as phantom


def report(*, quick: bool) -> None:
    """Time both metrics, print them and write the report."""
    from benchmarks.programs import seconds_of  # the pipeline's workers need no jax

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

    headline = {"voxels": truth.size, "structures": len(np.unique(truth)) - 1}
    for name, score in (("dice_s", dice), ("surface_dice_s", surface)):
        headline[name] = min(seconds_of(score, repeats=repeats, warm=0))
        headline[f"{name}_per_20_million"] = headline[name] * 20e6 / truth.size
    show(headline)
    save(headline)
