"""Checksums of a state's arrays, equal on any mesh.

An array whose leading axis is divided over devices, like experts, has one checksum per
row. So each process can check the rows that it holds.
"""

import zlib
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import numpy as np
from jax.tree_util import keystr, tree_flatten_with_path

from swinsmt_jax.runtime import processes


def of_state(state: Any) -> dict[str, int]:
    """Return {name: CRC-32} of a state's arrays; all processes must call this."""
    parts: dict[str, Any] = {}
    for name, leaf in _named(state).items():
        parts |= _parts(name, leaf, by_row=_is_divided(leaf))
    return {k: v for own in processes.gather(_crc(parts)) for k, v in own.items()}


def require_same(tree: Any, saved: Mapping[str, int]) -> None:
    """Raise `ValueError` if an array that this process holds has another checksum.

    Args:
        tree: a state, or a dictionary of some of its fields, such as "params".
        saved: from `of_state`; arrays that it lacks are not checked.
    """
    parts: dict[str, Any] = {}
    for name, leaf in _named(tree).items():
        parts |= _parts(name, leaf, by_row=_row(name, 0) in saved)
    differing = [k for k, v in _crc(parts).items() if saved.get(k, v) != v]
    if differing:
        raise ValueError(
            f"{len(differing)} arrays changed since they were saved, such as "
            f"{differing[0]}"
        )


def _named(tree):
    leaves = tree_flatten_with_path(tree)[0]
    return {keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}


def _is_divided(leaf):
    spec = getattr(getattr(leaf, "sharding", None), "spec", ())
    return len(spec) > 0 and spec[0] is not None


def _row(name, number):
    return f"{name}[{number}]"


def _parts(name, leaf, *, by_row):
    """Return this process's parts of an array, {name of the part: array}."""
    if not by_row:
        if isinstance(leaf, jax.Array) and not leaf.is_fully_replicated:
            return {}
        return {name: next(data for _, data in _pieces(leaf))}
    return {
        _row(name, first + i): row
        for first, data in _pieces(leaf)
        for i, row in enumerate(np.asarray(data))
    }


def _pieces(leaf) -> Iterator[tuple[int, np.ndarray]]:
    """Yield (first row, rows) of an array's parts on this process's devices."""
    if not isinstance(leaf, jax.Array):
        yield 0, leaf
        return
    for shard in leaf.addressable_shards:
        yield (shard.index[0].start or 0 if shard.index else 0), shard.data


def _crc(parts):
    def crc(array):
        return zlib.crc32(np.ascontiguousarray(array).reshape(-1).view(np.uint8))

    with ThreadPoolExecutor() as pool:  # zlib lets other threads run
        return dict(zip(parts, pool.map(crc, parts.values()), strict=True))
