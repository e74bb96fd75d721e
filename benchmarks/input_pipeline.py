"""Crops per second of the input pipeline, compared with the released MONAI loader.

    python -m benchmarks.input_pipeline [--quick] [--json=FILE]
    python -m benchmarks.input_pipeline --what=formats [--quick] [--json=FILE]

Both read the same phantoms (CT and merged labels, 2.5 mm) with the released recipe:
scaled HU, cropped foreground, zoom, one crop balanced between labelled and other
voxels, quarter turns, intensity shift. Ours reads crops from a store made by
preprocess.py. Links repeat each case there under many names, so memory that is kept per
case becomes visible. MONAI reads the files each time, as the released loader does. Each
measurement is a separate process. It reports crops/s after the start, in total and for
each worker (a process, or a thread if there are none). It also reports memory beyond
that after the imports, at a tenth of the way and at its peak: of the process, its
workers and the crops in shared memory, without page cache. Without MONAI its rows are
left out, and the ratio is null.

The headline describes the recommended configuration, two threads and no worker process:
`worker_peak_mb` is its largest memory over all crop sizes.

--what=formats writes a phantom's CT and labels in each candidate format of a store. One
thread then reads random crops of 96^3 of both, one after the other, from the page
cache. The formats take turns, and the table gives the median round.

--quick takes coarser phantoms, smaller crops and fewer of them.
"""

import importlib.util
import multiprocessing
import os
import shutil
import tempfile
import time
from pathlib import Path

from absl import flags

from benchmarks import run, save, show
from swinsmt_jax.config import DataConfig
from swinsmt_jax.data import meta, pipeline, preprocess
from swinsmt_jax.data.layouts import totalsegmentator
from swinsmt_jax.phantoms import dataset as phantom

RECOMMENDED = (2, 0)  # threads, worker processes
MB = 1e6


def processes():
    """Return the ids of this process and its children."""
    return [os.getpid(), *(p.pid for p in multiprocessing.active_children())]


def shared(before=frozenset()):
    """Return bytes of shared memory by inode: mapped by us, or new in /dev/shm."""
    found = {}
    for pid in processes():
        for line in Path(f"/proc/{pid}/maps").read_text().splitlines():
            if "/dev/shm/psm_" in line:  # as Python names it
                span, _, _, _, inode, *_ = line.split()
                first, last = (int(x, 16) for x in span.split("-"))
                found[int(inode)] = last - first
    for entry in os.scandir("/dev/shm"):
        if entry.name.startswith("psm_"):
            try:
                found[entry.inode()] = entry.stat().st_size
            except FileNotFoundError:  # a crop that has arrived
                continue
    return {inode: size for inode, size in found.items() if inode not in before}


def resident_mb(before):
    """Return the memory of this process and its children, without page cache."""
    total = sum(shared(before).values())
    for pid in processes():
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
        total += sum(1024 * int(x.split()[1]) for x in lines if x.startswith("RssAnon"))
    return total / MB


def consume(batches, count):
    """Return crops/s, and MB beyond the start: at a tenth, and at the most."""
    others = frozenset(shared())
    before, peak, early = resident_mb(others), 0.0, 0.0
    for _ in range(8):
        next(batches)
    start = time.perf_counter()
    for i in range(count):
        next(batches)
        if i % 10 == 0:
            peak = max(peak, resident_mb(others) - before)
        if i <= count // 10:
            early = peak
    rate = count / (time.perf_counter() - start)
    batches.close()
    return rate, early, peak


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


def link_cases(root, count):
    """Add links to a store's cases under other names, until it has `count`."""
    names = list(meta.read(Path(root)))
    added = {f"link{i}": "train" for i in range(count - len(names))}
    for i, name in enumerate(added):
        source = Path(root, names[i % len(names)])
        shutil.copytree(source, Path(root, name), copy_function=os.link)
    meta.add(Path(root), added)


def measure(scans, spacing, cases, sides, configurations, count, few):
    """Return a row for each pipeline, side of crops and configuration.

    Args:
        scans: phantoms made.
        spacing: of their voxels in mm.
        cases: of the store, by links.
        sides: of the crops.
        configurations: of ours: (threads, worker processes).
        count: crops of ours.
        few: crops of MONAI's.
    """
    peer = importlib.util.find_spec("monai") is not None
    processes = sorted({workers for _, workers in configurations})
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        raw, root = f"{folder}/raw", f"{folder}/store"
        phantom.write_dataset(
            raw, train=scans, val=0, test=0, spacing=spacing, seed=0, workers=2
        )
        preprocess.preprocess(raw, root, workers=2)
        link_cases(root, cases)
        jobs = [
            *(("ours", side, *c) for side in sides for c in configurations),
            *(("monai", side, 1, n) for side in sides for n in processes if peer),
        ]
        for name, side, threads, workers in jobs:
            function, data, crops = {
                "ours": (ours, root, count),
                "monai": (monais, raw, few),
            }[name]
            rate, early, peak = in_process(
                function, data, side, threads, workers, crops
            )
            rows.append(
                {
                    "pipeline": name,
                    "side": side,
                    "threads": threads,
                    "workers": workers,
                    "crops_per_s": rate,
                    "crops_per_s_per_worker": rate / (workers or threads),
                    "early_mb": early,
                    "peak_mb": peak,
                }
            )
            print(rows[-1], flush=True)
    return rows


def headline(rows):
    """Return the figures of the recommended configuration, at the first side."""
    side = rows[0]["side"]
    found = [
        row
        for row in rows
        if (row["pipeline"], row["threads"], row["workers"]) == ("ours", *RECOMMENDED)
    ]
    rate = next(row["crops_per_s"] for row in found if row["side"] == side)
    peers = [
        row["crops_per_s"]
        for row in rows
        if (row["pipeline"], row["side"]) == ("monai", side)
    ]
    return {
        f"crops_per_s_{side}": rate,
        f"ratio_to_monai_{side}": rate / max(peers) if peers else None,
        "worker_peak_mb": max(row["peak_mb"] for row in found),
    }


def main(options):
    if options.what == "formats":  # its processes are to import little
        from benchmarks import store_formats

        return store_formats.report(quick=options.quick)
    settings = {
        "scans": 6,
        "spacing": 2.5,
        "cases": 600,
        "sides": (96, 128),
        "configurations": ((1, 0), (2, 0), (4, 0), (1, 2)),
        "count": 2000,
        "few": 40,
    }
    if options.quick:
        settings |= {"scans": 2, "spacing": 5.0, "sides": (96,), "count": 200, "few": 5}
        settings["configurations"] = (RECOMMENDED,)
    rows = measure(**settings)
    show(headline(rows))
    save(headline(rows), rows=rows, settings=settings)


if __name__ == "__main__":
    what = ("pipeline", "formats")
    flags.DEFINE_enum("what", what[0], what, "what is measured")
    run(main, quick="few small scans and crops, under a minute")
