"""Volumes on disk of which boxes are read alone.

One Zarr v3 array in one file: a shard of chunks of CHUNK^3 voxels, blosc lz4, read by
byte range.
"""

import functools
from pathlib import Path

import numpy as np
import tensorstore

CHUNK = 32  # measured: as fast as larger ones; see docs/data.md


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
        "codecs": [*plain, {"name": "blosc", "configuration": lz4}],
        "index_codecs": [*plain, {"name": "crc32c"}],
    }
    metadata = {
        "shape": list(array.shape),
        "data_type": str(array.dtype),
        "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": shard}},
        "codecs": [{"name": "sharding_indexed", "configuration": sharding}],
    }
    spec = {**_spec(path), "metadata": metadata, "create": True}
    tensorstore.open(spec).result().write(array).result()


@functools.lru_cache(maxsize=256)  # 10 kB each; opening takes 0.3 ms
def opened(path: Path) -> tensorstore.TensorStore:
    """Open a volume; `opened(path)[box].read().result()` is an array.

    Raises:
        ValueError: for what is missing or damaged.
    """
    return tensorstore.open(_spec(path), read=True).result()


def _spec(path):
    return {
        "driver": "zarr3",
        "kvstore": {"driver": "file", "path": str(path)},
        "context": {"cache_pool": {"total_bytes_limit": 0}},  # the page cache serves
    }
