"""Crops per second of the input pipeline, beside MONAI's loader of the released code.

    python -m benchmarks.input_pipeline [--quick] [--json=FILE]

Both read the same phantoms (CT and merged labels, 2.5 mm) with the released recipe:
HU scaled, foreground cropped, zoom, one crop balanced between labelled and other
voxels, quarter turns, shift of intensity. Ours reads crops from a store that
preprocess.py made; MONAI reads the files each time, as the released loader does. Each
measurement is a process of its own, of which crops/s after the start and the memory
beyond that after the imports are told; page cache is not counted. Without MONAI its
rows and ratios are left out, and that is said.
"""

import importlib.util
import json
import multiprocessing
import os
import platform
import tempfile
import time
from pathlib import Path

from absl import app, flags

from benchmarks import command_line, define_file
from swinsmt_jax.config import DataConfig
from swinsmt_jax.data import phantom, pipeline, preprocess, totalsegmentator


def resident_mb():
    """Return the memory of this process and its children, without page cache."""
    total = 0
    for pid in [os.getpid(), *(p.pid for p in multiprocessing.active_children())]:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
        total += sum(int(x.split()[1]) for x in lines if x.startswith("RssAnon"))
    return total / 1e3


def consume(batches, count):
    """Return crops/s, and MB beyond the start: at a tenth, and at the most."""
    before, peak, early = resident_mb(), 0.0, 0.0
    for _ in range(8):
        next(batches)
    start = time.perf_counter()
    for i in range(count):
        next(batches)
        if i % 10 == 0:
            peak = max(peak, resident_mb() - before)
        if i <= count // 10:
            early = peak
    return count / (time.perf_counter() - start), early, peak


def ours(root, side, threads, workers, count):
    config = DataConfig(
        root,
        patch_shape=(side,) * 3,
        batch_size=1,
        num_threads=threads,
        num_workers=workers,
    )
    cases = pipeline.find_cases(config, split="train")
    return consume(pipeline.training_batches(config, cases, seed=0), count)


def monais(root, side, threads, workers, count):
    """The released transforms, in as many loader processes (0: in this one)."""
    import torch
    from monai import data, transforms

    torch.set_num_threads(threads)
    keys = ("image", "label")
    steps = transforms.Compose(
        [
            transforms.LoadImaged(keys),
            transforms.EnsureChannelFirstd(keys),
            transforms.Orientationd(keys, "RAS"),
            transforms.ScaleIntensityRanged("image", -1024, 1024, 0, 1, clip=True),
            transforms.CropForegroundd(keys, "image", allow_smaller=True),
            transforms.RandZoomd(
                keys, prob=0.3, min_zoom=1.3, max_zoom=1.5, mode=("area", "nearest")
            ),
            transforms.SpatialPadd(keys, (side,) * 3),
            transforms.RandCropByPosNegLabeld(
                keys, "label", (side,) * 3, 1, 1, 1, "image", 0
            ),
            transforms.RandRotate90d(keys, prob=0.1, max_k=3),
            transforms.RandShiftIntensityd("image", 0.1, prob=0.2),
        ]
    )
    cases = [
        {"image": str(case.ct), "label": str(case.segmentation)}
        for case in totalsegmentator.find_cases(root, split="train")
    ]
    loader = data.DataLoader(
        data.Dataset(cases, steps), workers, batch_size=1, shuffle=True
    )

    def endless():
        while True:
            yield from loader

    return consume(endless(), count)


def in_process(function, *arguments):
    """Call in a fresh process, which may have children of its own."""
    context = multiprocessing.get_context("spawn")
    reader, writer = context.Pipe(duplex=False)
    process = context.Process(target=_send, args=(writer, function, arguments))
    process.start()
    writer.close()
    result = reader.recv()
    process.join()
    return result


def _send(writer, function, arguments):
    writer.send(function(*arguments))


def main(_):
    options = flags.FLAGS
    peer = importlib.util.find_spec("monai") is not None
    cases, sides, count = (2, (32,), 20) if options.quick else (6, (96, 128), 2000)
    spacing = 10.0 if options.quick else 2.5
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        raw, root = f"{folder}/raw", f"{folder}/store"
        phantom.write_dataset(
            raw, train=cases, val=0, test=0, spacing=spacing, seed=0, workers=2
        )
        preprocess.preprocess(raw, root, workers=2)
        for side in sides:
            for threads, workers in ((1, 0), (2, 0), (4, 0), (1, 2)):
                rate, early, peak = in_process(
                    ours, root, side, threads, workers, count
                )
                rows.append(
                    {
                        "pipeline": "ours",
                        "side": side,
                        "threads": threads,
                        "workers": workers,
                        "crops_per_s": rate,
                        "early_mb": early,
                        "peak_mb": peak,
                    }
                )
                print(rows[-1], flush=True)
            for workers in (0, 2) if peer else ():
                few = 10 if options.quick else 40
                rate, early, peak = in_process(monais, raw, side, 1, workers, few)
                rows.append(
                    {
                        "pipeline": "monai",
                        "side": side,
                        "threads": 1,
                        "workers": workers,
                        "crops_per_s": rate,
                        "early_mb": early,
                        "peak_mb": peak,
                    }
                )
                print(rows[-1], flush=True)
    side = sides[0]
    best = {
        name: max(
            (r for r in rows if r["pipeline"] == name and r["side"] == side),
            key=lambda row: row["crops_per_s"],
            default=None,
        )
        for name in ("ours", "monai")
    }
    headline = {
        f"crops_per_s_{side}": best["ours"]["crops_per_s"],
        "worker_peak_mb": best["ours"]["peak_mb"],
    }
    if peer:
        headline[f"ratio_to_monai_{side}"] = (
            best["ours"]["crops_per_s"] / best["monai"]["crops_per_s"]
        )
    else:
        print("MONAI is not installed, so there is no ratio")
    print(json.dumps(headline, indent=1))
    if options.json:
        report = {
            "headline": headline,
            "rows": rows,
            "machine": f"{platform.machine()}, {os.cpu_count()} cores",
            "versions": {"python": platform.python_version()},
            "command": command_line(),
        }
        Path(options.json).write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    flags.DEFINE_bool("quick", False, "small scans and crops, to see that it works")
    define_file("json", "also write the figures to this file")
    app.run(main)
