"""Crops per second in formats of a store; see `benchmarks.input_pipeline`."""

import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import tensorstore

from benchmarks import markdown_table, save
from swinsmt_jax.data.case import load_case
from swinsmt_jax.data.layouts import totalsegmentator
from swinsmt_jax.phantoms import dataset as phantom

NPY = "memory-mapped .npy"


def blosc(name, level):
    return {"cname": name, "clevel": level, "shuffle": "shuffle"}


def sharded(array, side, codec):
    """Return the Zarr v3 metadata of one shard, a single file, of chunks of side^3."""
    plain = [{"name": "bytes", "configuration": {"endian": "little"}}]
    sharding = {
        "chunk_shape": [side] * 3,
        "codecs": [*plain, {"name": "blosc", "configuration": codec}],
        "index_codecs": [*plain, {"name": "crc32c"}],
    }
    shard = [-(-n // side) * side for n in array.shape]
    grid = {"name": "regular", "configuration": {"chunk_shape": shard}}
    return {
        "shape": list(array.shape),
        "data_type": str(array.dtype),
        "chunk_grid": grid,
        "codecs": [{"name": "sharding_indexed", "configuration": sharding}],
    }


def chunked(array, side, codec):
    """Return the Zarr v2 metadata of chunks of side^3, each a file."""
    return {
        "shape": list(array.shape),
        "dtype": array.dtype.str,
        "chunks": [side] * 3,
        "compressor": {"id": "blosc", **codec, "shuffle": 1},
    }


LZ4, ZSTD = blosc("lz4", 5), blosc("zstd", 1)
FORMATS = {
    NPY: None,
    "Zarr v2, chunks of 32^3, lz4": ("zarr", chunked, 32, LZ4),
    "Zarr v2, chunks of 64^3, lz4": ("zarr", chunked, 64, LZ4),
    "Zarr v3, one shard, chunks of 32^3, lz4": ("zarr3", sharded, 32, LZ4),
    "Zarr v3, one shard, chunks of 64^3, lz4": ("zarr3", sharded, 64, LZ4),
    "Zarr v3, one shard, chunks of 32^3, zstd 1": ("zarr3", sharded, 32, ZSTD),
}


def write(path, array, form):
    """Write an array and return a function that reads a box, or begins to."""
    if form is None:
        np.save(path.with_suffix(".npy"), array)
        mapped = np.load(path.with_suffix(".npy"), mmap_mode="r")
        return lambda box: np.array(mapped[box])
    driver, describe, side, codec = form
    spec = {
        "driver": driver,
        "kvstore": {"driver": "file", "path": str(path)},
        "metadata": describe(array, side, codec),
        "context": {"cache_pool": {"total_bytes_limit": 0}},
        "create": True,
    }
    opened = tensorstore.open(spec).result()
    opened.write(array).result()
    return lambda box: opened[box].read()


def crops_per_s(readers, shape, side, count, seed):
    rng = np.random.default_rng(seed)
    firsts = rng.integers(0, [max(n - side, 0) + 1 for n in shape], (count, 3))
    start = time.perf_counter()
    for first in firsts.tolist():
        box = tuple(
            slice(f, min(f + side, n)) for f, n in zip(first, shape, strict=True)
        )
        pending = [reader(box) for reader in readers]  # at once, as from a store
        for crop in pending:
            if isinstance(crop, tensorstore.Future):
                crop.result()
    return count / (time.perf_counter() - start)


def measure(spacing, side, count, rounds):
    """Return a row for each format."""
    with tempfile.TemporaryDirectory() as folder:
        raw = Path(folder, "raw")
        phantom.write_dataset(raw, train=1, val=0, test=0, spacing=spacing, seed=0)
        (case,) = totalsegmentator.find_cases(raw, split="train")
        sample = load_case(case)
        rows, readers = [], []
        for i, (name, form) in enumerate(FORMATS.items()):
            own = Path(folder, str(i))
            own.mkdir()
            arrays = {"image": sample.image, "label": sample.label}
            readers.append([write(own / k, a, form) for k, a in arrays.items()])
            files = [f for f in own.rglob("*") if f.is_file()]
            data = [f for f in files if f.name not in ("zarr.json", ".zarray")]
            size = sum(f.stat().st_size for f in files) / 1e6
            shape = list(sample.image.shape)
            rows.append({"format": name, "files": len(data), "mb": size})
            rows[-1]["shape"] = shape
        rates = [
            [crops_per_s(r, shape, side, count, seed) for r in readers]
            for seed in range(rounds + 1)
        ][1:]  # the first round fills the page cache
    for row, found in zip(rows, zip(*rates, strict=True), strict=True):
        row["crops_per_s"] = statistics.median(found)
    return rows


def report(*, quick: bool) -> None:
    """Measure all formats, print them and write the report."""
    settings = {"spacing": 2.5, "side": 96, "count": 60, "rounds": 5}
    if quick:
        settings = {"spacing": 12.0, "side": 32, "count": 5, "rounds": 2}
    rows = measure(**settings)
    print(f"Phantom of {rows[0]['shape']} voxels, crops of {settings['side']}^3\n")
    lines = [
        (r["format"], f"{r['crops_per_s']:.0f}", str(r["files"]), f"{r['mb']:.1f}")
        for r in rows
    ]
    print(markdown_table(("", "crops/s", "files, image and label", "MB"), lines))
    headline = {row["format"]: row["crops_per_s"] for row in rows}
    save(headline, rows=rows, settings=settings)
