"""Pairs of masks, and what other tools measure of them; for `benchmarks.conventions`.

Each function takes a prediction and the truth of one structure, bool `[X, Y, Z]`, and
returns the tool's own figures by the name of the metric; None where it refuses.
"""

import contextlib
import warnings
from collections.abc import Iterator

import numpy as np

TOLERANCE = 1.0  # mm


def monai(prediction, truth, *, spacing, tolerance=TOLERANCE):
    """Return what MONAI gives, without the background."""
    import torch
    from monai import metrics

    def one_hot(mask):
        return torch.from_numpy(np.stack([~mask, mask])[None].astype(np.float32))

    pair, sides = (one_hot(prediction), one_hot(truth)), list(spacing)
    (dice,) = metrics.compute_dice(*pair, include_background=False)
    (nsd,) = metrics.compute_surface_dice(*pair, [tolerance], spacing=sides)
    (hd,) = metrics.compute_hausdorff_distance(*pair, percentile=95, spacing=sides)
    (asd,) = metrics.compute_average_surface_distance(
        *pair, symmetric=True, spacing=sides
    )
    names = ("dice", "surface_dice", "hd95", "assd")
    return {n: float(x) for n, x in zip(names, (dice, nsd, hd, asd), strict=True)}


def nnunet(prediction, truth, *, spacing, tolerance=TOLERANCE):
    """Return what nnU-Net's evaluation gives."""
    from nnunetv2.evaluation.evaluate_predictions import compute_tp_fp_fn_tn

    tp, fp, fn, _ = map(float, compute_tp_fp_fn_tn(truth, prediction))
    # As its compute_metrics goes on.
    return {"dice": 2 * tp / (2 * tp + fp + fn) if tp + fp + fn else np.nan}


def surface_distance(prediction, truth, *, spacing, tolerance=TOLERANCE):
    """Return what DeepMind's package gives, with the names that numpy 2 dropped."""
    import surface_distance as tool

    with _old_numpy():
        found = tool.compute_surface_distances(truth, prediction, spacing)
        return {
            "dice": tool.compute_dice_coefficient(truth, prediction),
            "surface_dice": tool.compute_surface_dice_at_tolerance(found, tolerance),
            "hd95": tool.compute_robust_hausdorff(found, 95),
            "assd": np.mean(tool.compute_average_surface_distance(found)),
        }


def totalseg(prediction, truth, *, spacing, tolerance=TOLERANCE):
    """Return what TotalSegmentator's resources/evaluate.py gives, by the same package.

    The script is not part of its package.
    """
    import surface_distance as tool

    if not truth.any() or not prediction.any():
        score = 0.0 if truth.any() else np.nan
        return {"dice": score, "surface_dice": score}
    with _old_numpy():
        found = tool.compute_surface_distances(truth, prediction, [1.5, 1.5, 1.5])
        nsd = tool.compute_surface_dice_at_tolerance(found, 3.0)
    both = 2 * np.sum(truth * prediction)
    return {
        "dice": both / (np.sum(truth) + np.sum(prediction) + 1e-6),
        "surface_dice": nsd,
    }


def medpy(prediction, truth, *, spacing, tolerance=TOLERANCE):
    """Return what MedPy gives."""
    from medpy.metric import binary

    return {
        "dice": binary.dc(prediction, truth),
        "hd95": _or_none(binary.hd95, prediction, truth, voxelspacing=spacing),
        "assd": _or_none(binary.assd, prediction, truth, voxelspacing=spacing),
        "volume": _or_none(binary.ravd, prediction, truth),
    }


def panoptica(prediction, truth, *, spacing, tolerance=None):
    """Return what panoptica's metrics give of whole masks."""
    from panoptica.metrics import Metric

    def measure(metric, **options):
        return _or_none(metric, truth, prediction, **options)

    return {
        "dice": measure(Metric.DSC),
        "surface_dice": measure(Metric.NSD, voxelspacing=spacing, threshold=tolerance),
        "hd95": measure(Metric.HD95, voxelspacing=spacing),
        "assd": measure(Metric.ASSD, voxelspacing=spacing),
        "volume": measure(Metric.RVD),
    }


def seg_metrics(prediction, truth, *, spacing, tolerance=TOLERANCE):
    """Return what seg-metrics gives."""
    from seg_metrics import seg_metrics as tool

    (found,) = tool.write_metrics(
        labels=[1],
        gdth_img=truth.astype(np.uint8),
        pred_img=prediction.astype(np.uint8),
        metrics=["dice", "hd95", "msd"],
        TPTNFPFN=False,
    )
    dice, hd, mean = (float(found[name][0]) for name in ("dice", "hd95", "msd"))
    return {"dice": dice, "hd95": hd, "assd": mean}


def simple_itk(prediction, truth, *, spacing, tolerance=TOLERANCE):
    """Return what SimpleITK gives; its average is over whole masks."""
    import SimpleITK

    pair = [
        SimpleITK.GetImageFromArray(x.astype(np.uint8)) for x in (prediction, truth)
    ]
    distances, overlap = (
        SimpleITK.HausdorffDistanceImageFilter(),
        SimpleITK.LabelOverlapMeasuresImageFilter(),
    )
    done = _or_none(lambda: distances.Execute(*pair) or 0)
    mean = None if done is None else distances.GetAverageHausdorffDistance()
    overlap.Execute(*pair)
    return {"dice": overlap.GetDiceCoefficient(), "assd": mean}


def torchmetrics(prediction, truth, *, spacing, tolerance=TOLERANCE):
    """Return what torchmetrics gives, without the background."""
    import torch
    from torchmetrics.segmentation import DiceScore

    tool = DiceScore(2, include_background=False, input_format="index")
    pair = [torch.from_numpy(x[None].astype(int)) for x in (prediction, truth)]
    return {"dice": float(tool(*pair))}


TOOLS = {  # by the name of their protocol
    "monai": monai,
    "nnunet": nnunet,
    "totalseg": totalseg,
    "surface-distance": surface_distance,
    "medpy": medpy,
    "panoptica": panoptica,
}
OTHERS = {
    "seg-metrics": seg_metrics,
    "SimpleITK": simple_itk,
    "torchmetrics": torchmetrics,
}


def _or_none(function, *arguments, **options):
    try:
        return float(function(*arguments, **options))
    except (RuntimeError, IndexError, ZeroDivisionError, ValueError):
        return None


@contextlib.contextmanager
def _old_numpy():
    """Give numpy the names that surface-distance 0.1 calls."""
    missing = {"Inf": np.inf, "NaN": np.nan}
    for name, value in missing.items():
        setattr(np, name, value)
    try:
        with warnings.catch_warnings(), np.errstate(all="ignore"):
            warnings.simplefilter("ignore")
            yield
    finally:
        for name in missing:
            delattr(np, name)


def box(shape, *sides):
    """Return a mask that is true in a box, such as (2, 6), (2, 22), (2, 22)."""
    mask = np.zeros(shape, bool)
    mask[tuple(slice(*side) for side in sides)] = True
    return mask


def known_pairs() -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Return {name: (prediction, truth)} of the pairs in docs/numbers.md, of 1 mm."""
    empty = np.zeros((24,) * 3, bool)
    slab = box((24,) * 3, (2, 6), (2, 22), (2, 22))
    cube = box((20,) * 3, (5, 10), (5, 10), (5, 10))
    plate = box((20,) * 3, (10, 11), (4, 20), (4, 20))
    line = box((20,) * 3, (10, 11), (4, 20), (10, 11))
    return {
        "slab": (slab | box((24,) * 3, (6, 12), (2, 22), (2, 5)), slab),
        "missed": (np.zeros_like(cube), cube),
        "full": (box((24,) * 3, (1, 24), (0, 24), (0, 24)), ~empty),
        "plate": (box((20,) * 3, (10, 12), (4, 20), (4, 20)), plate),
        "line": (box((20,) * 3, (10, 11), (4, 20), (11, 12)), line),
        "both empty": (empty, empty),
    }


def thirty_pairs(seed: int = 0) -> Iterator[tuple[np.ndarray, np.ndarray, tuple]]:
    """Yield prediction and truth, label ids 0 to 4 in uint8, and a voxel's sides in mm.

    Among them are random, empty, missed, invented, thin and cut structures.
    """
    rng = np.random.default_rng(seed)
    for i in range(30):
        shape = tuple(rng.integers(9, 26, 3))
        spacing = tuple(rng.choice([0.6, 0.75, 1.0, 1.5, 3.0], 3).tolist())
        spacing = (1.5, 1.5, 1.5) if i % 3 == 0 else spacing
        truth, prediction = np.zeros((2, *shape), np.uint8)
        for k in (1, 2, 3, 4):
            first = [int(rng.integers(0, n - 2)) for n in shape]
            sides = rng.integers(1, 9, 3)
            if k == 2:
                sides[rng.integers(3)] = 1  # a plate
            if k == 3:
                first[0] = 0  # cut by the end of the scan
            moved = [max(0, a + int(rng.integers(-2, 3))) for a in first]
            for labels, start in ((truth, first), (prediction, moved)):
                labels[tuple(map(slice, start, start + sides))] = k
        noise = rng.random(shape) < 0.02
        prediction[noise] = rng.integers(0, 5, noise.sum())
        if i % 5 == 1:
            prediction[prediction == 4] = 0  # missed
        if i % 5 == 2:
            truth[truth == 4] = 0  # invented
        if i % 5 == 3:
            truth[truth == 4] = prediction[prediction == 4] = 0
        if i % 10 == 4:
            prediction = rng.integers(0, 5, shape).astype(np.uint8)
        yield prediction, truth, spacing
