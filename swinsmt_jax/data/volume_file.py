"""Volumes on disk that allow reading single boxes.

Each volume is one Zarr v3 array in one file: a shard of chunks of CHUNK^3 voxels, blosc
lz4 with a checksum, read by byte range. Volumes of earlier versions lack checksums and
chunks of zeros.
"""

import functools
from pathlib import Path

import numpy as np
import tensorstore

CHUNK = 32  # measured: as fast as larger ones; see docs/data.md
METADATA, SHARD = "zarr.json", "c/0/0/0"  # the files of a volume
CHECKSUM = {"name": "crc32c"}


def write(path: Path, array: np.ndarray) -> None:
    """Write a volume to a new folder.

    Args:
        path: of the folder.
        array: [h, w, d].
    """
    shard = [-(-n // CHUNK) * CHUNK for n in array.shape]
    plain = [{"name": "bytes", "configuration": {"endian": "little"}}]
    lz4 = {"cname": "lz4", "clevel": 5, "shuffle": "shuffle"}
    sharding = {
        "chunk_shape": [CHUNK] * 3,
        "codecs": [*plain, {"name": "blosc", "configuration": lz4}, CHECKSUM],
        "index_codecs": [*plain, CHECKSUM],
    }
    metadata = {
        "shape": list(array.shape),
        "data_type": str(array.dtype),
        "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": shard}},
        "codecs": [{"name": "sharding_indexed", "configuration": sharding}],
    }
    spec = {
        **_spec(path),
        **{"metadata": metadata, "create": True},
        "store_data_equal_to_fill_value": True,  # so that a missing chunk is a lost one
    }
    tensorstore.open(spec).result().write(array).result()


def open_volume(path: Path) -> tensorstore.TensorStore:
    """Open a volume; `open_volume(path)[box].read().result()` is an array.

    A missing or damaged chunk raises. But in volumes of earlier versions a missing
    chunk or shard reads as zeros.

    Raises:
        ValueError: for missing or damaged data.
    """
    strict = {**_spec(path), "fill_missing_data_reads": False}
    volume = tensorstore.open(strict, read=True).result()
    (sharding,) = volume.spec().to_json()["metadata"]["codecs"]
    if CHECKSUM in sharding["configuration"]["codecs"]:
        return volume
    return tensorstore.open(_spec(path), read=True).result()


opened = functools.lru_cache(maxsize=256)(open_volume)  # 10 kB each; takes 0.3 ms


def _spec(path):
    return {
        "driver": "zarr3",
        "kvstore": {"driver": "file", "path": str(path)},
        "context": {"cache_pool": {"total_bytes_limit": 0}},  # the page cache serves
    }
