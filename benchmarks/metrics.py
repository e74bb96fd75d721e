"""Time and memory of scoring a whole-body case, compared with DeepMind's and MONAI's.

    python -m benchmarks.metrics [--quick] [--json=FILE]

Two label maps of 117 ellipsoids, the prediction moved by a voxel on each axis. Ours:
Dice, surface Dice, HD95, ASSD and volumes in one pass. "surface-distance": Dice as
here, and surface Dice by DeepMind's package, class by class in its box, in a thread for
each core, which is how this package did it before. MONAI: Dice, surface Dice with
subvoxels and HD95, class by class; of the smaller volume alone, left out where it is
not installed. Each is a process of its own; the fastest of three runs counts (of one
for MONAI), and the peak of memory above that with both label maps loaded, in label
maps. The surface Dice of all is compared.

--quick takes a small volume.
"""

import importlib.util
import json
import subprocess
import sys
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from scipy import ndimage

from benchmarks import markdown_table, process_bytes, run, save

SHAPES = ((200, 200, 320), (300, 300, 500))
SPACING = (1.5, 1.5, 1.5)
TOLERANCE = 2.0
CLASSES = 118


def ellipsoids(shape: tuple[int, ...], seed: int = 0) -> np.ndarray:
    """Return a label map, uint8, of 117 ellipsoids; a later one covers others."""
    rng = np.random.default_rng(seed)
    labels, scale = np.zeros(shape, np.uint8), np.array(shape) / (200, 200, 320)
    for k in range(1, CLASSES):
        radii = rng.uniform(5, 28, 3) * scale
        centre = rng.uniform(radii + 1, shape - radii - 1)
        low = np.floor(centre - radii).astype(int)
        box = tuple(map(slice, low, np.ceil(centre + radii).astype(int) + 1))
        axes = np.ogrid[box]
        parts = zip(axes, centre, radii, strict=True)
        labels[box][sum(((x - c) / r) ** 2 for x, c, r in parts) <= 1] = k
    return labels


def ours(prediction, truth):
    from swinsmt_jax.evaluation import metrics, overlap, surface

    rule = surface.SurfaceRule(TOLERANCE)
    counts = overlap.overlap_counts(prediction, truth, num_classes=CLASSES)
    pair = overlap.Pair(prediction, truth, counts, SPACING)
    chosen = metrics.chosen_metrics(surface_rule=rule)
    return metrics.measured(pair, chosen, surface_rule=rule)["surface_dice"]


def in_boxes(prediction, truth):
    import loky
    import surface_distance

    from swinsmt_jax.evaluation import conventions, overlap

    conventions.dice(overlap.overlap_counts(prediction, truth, num_classes=CLASSES))
    boxes = [ndimage.find_objects(x, CLASSES - 1) for x in (truth, prediction)]

    def measure(k):
        one, other = (found[k - 1] for found in boxes)
        if one is None or other is None:
            return np.nan
        box = tuple(
            slice(min(a.start, b.start), max(a.stop, b.stop))
            for a, b in zip(one, other, strict=True)
        )
        found = surface_distance.compute_surface_distances(
            truth[box] == k, prediction[box] == k, SPACING
        )
        return surface_distance.compute_surface_dice_at_tolerance(found, TOLERANCE)

    with ThreadPoolExecutor(loky.cpu_count()) as pool:
        return np.array([np.nan, *pool.map(measure, range(1, CLASSES))])


def monai(prediction, truth):
    import torch
    from monai import metrics

    found, sides = np.full(CLASSES, np.nan), list(SPACING)
    for k in range(1, CLASSES):
        pair = [torch.from_numpy(x == k)[None, None] for x in (prediction, truth)]
        metrics.compute_dice(*pair, include_background=True)
        found[k] = metrics.compute_surface_dice(
            *pair,
            [TOLERANCE],
            include_background=True,
            spacing=sides,
            use_subvoxels=True,
        )
        metrics.compute_hausdorff_distance(
            *pair, include_background=True, percentile=95, spacing=sides
        )
    return found


WAYS = {"ours": ours, "surface-distance": in_boxes, "monai": monai}


def measure(way: str, shape: tuple[int, ...], *, repeats: int) -> dict:
    """Return seconds, peak memory in label maps and surface Dice, of this process."""
    score = WAYS[way]
    truth = ellipsoids(shape)
    prediction = np.roll(truth, (1, 1, 1), axis=(0, 1, 2))
    warnings.simplefilter("ignore")
    score(prediction[:40, :40, :40], truth[:40, :40, :40])  # imports and caches
    before, seconds = process_bytes("VmRSS"), []
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    for _ in range(repeats):
        start = time.perf_counter()
        found = score(prediction, truth)
        seconds.append(time.perf_counter() - start)
    peak = (process_bytes("VmHWM") - before) / truth.nbytes
    return {
        "way": way,
        "shape": list(shape),
        "structures": len(np.unique(truth)) - 1,
        "seconds": min(seconds),
        "peak_label_maps": peak,
        "surface_dice": float(np.nanmean(found)),
    }


def apart(way, shape, *, repeats):
    """Measure in a process of its own."""
    code = (
        "import json; from benchmarks import metrics; "
        f"print(json.dumps(metrics.measure({way!r}, {shape!r}, repeats={repeats})))"
    )
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def headline(rows: list[dict]) -> dict:
    """Compare ours with the others, by shape."""
    found = {}
    for shape in {tuple(row["shape"]): None for row in rows}:
        by_way = {row["way"]: row for row in rows if tuple(row["shape"]) == shape}
        name, own = "x".join(map(str, shape)), by_way["ours"]
        found[f"seconds_{name}"] = own["seconds"]
        found[f"peak_label_maps_{name}"] = own["peak_label_maps"]
        for way, row in by_way.items():
            if way != "ours":
                found[f"ratio_to_{way}_{name}"] = own["seconds"] / row["seconds"]
                differs = abs(own["surface_dice"] - row["surface_dice"])
                found[f"surface_dice_from_{way}_{name}"] = differs
    return found


def main(options):
    shapes, repeats = ([(60, 60, 80)], 1) if options.quick else (SHAPES, 3)
    runs = [(way, shape) for shape in shapes for way in ("ours", "surface-distance")]
    if importlib.util.find_spec("monai"):
        runs.insert(2, ("monai", shapes[0]))
    rows = []
    for way, shape in runs:
        rows.append(apart(way, shape, repeats=1 if way == "monai" else repeats))
        print(rows[-1], flush=True)
    table = [
        [
            " x ".join(map(str, row["shape"])),
            row["way"],
            f"{row['seconds']:.2f} s",
            f"{row['peak_label_maps']:.2f}",
            f"{row['surface_dice']:.8f}",
        ]
        for row in rows
    ]
    header = ["voxels", "way", "time", "peak, in label maps", "mean surface Dice"]
    print(markdown_table(header, table))
    print(json.dumps(headline(rows), indent=1))
    save(headline(rows), rows=rows)


if __name__ == "__main__":
    run(main, quick="a small volume, a few seconds")
