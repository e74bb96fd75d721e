"""Join small parameters to one array during the optimizer's update.

Most parameters are biases and scales. Updating each one separately takes longer to
trace, compile and load than to run.
"""

import math
from collections.abc import Callable, Hashable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from swinsmt_jax.sharding import path_name

SMALL = 2**16  # elements; larger parameters are not joined, which would copy them


class Packing:
    """The parameters to join: small ones of one kind that every device holds whole.

    The packed form of nested dictionaries is a flat one. It maps the path of a
    parameter, or of the first joined one, to an array.

    Args:
        abstract: nested dictionaries of the parameters' shapes, dtypes and shardings.
        kind: of a path; parameters of different kinds stay apart.
    """

    def __init__(self, abstract: dict, *, kind: Callable[[str], Hashable]):
        leaves, self._structure = jax.tree_util.tree_flatten_with_path(abstract)
        self._shapes = {path_name(path): leaf.shape for path, leaf in leaves}
        groups: dict[Hashable, list[str]] = {}
        for name, (_, leaf) in zip(self._shapes, leaves, strict=True):
            joined = leaf.size <= SMALL and leaf.sharding.is_fully_replicated
            key = (kind(name), leaf.dtype) if joined else name
            groups.setdefault(key, []).append(name)
        self._groups = {names[0]: names for names in groups.values()}

    def pack(self, tree: Any) -> Any:
        """Return a tree with every part that is nested like the parameters packed."""
        return jax.tree.map(
            lambda part: self._pack(part) if self._is_whole(part) else part,
            tree,
            is_leaf=self._is_whole,
        )

    def unpack(self, tree: Any) -> Any:
        """Undo `pack`."""
        return jax.tree.map(
            lambda part: self._unpack(part) if self._is_packed(part) else part,
            tree,
            is_leaf=self._is_packed,
        )

    def _is_whole(self, tree):
        return jax.tree.structure(tree) == self._structure

    def _is_packed(self, tree):
        return isinstance(tree, dict) and tree.keys() == self._groups.keys()

    def _pack(self, tree):
        arrays = dict(zip(self._shapes, jax.tree.leaves(tree), strict=True))
        return {
            first: _join([arrays[name] for name in names])
            for first, names in self._groups.items()
        }

    def _unpack(self, packed):
        arrays = {}
        for first, names in self._groups.items():
            parts = _split(packed[first], [self._shapes[name] for name in names])
            arrays |= zip(names, parts, strict=True)
        return self._structure.unflatten(arrays[name] for name in self._shapes)


def _join(arrays):
    if len(arrays) == 1:
        return arrays[0]
    return jnp.concatenate([array.ravel() for array in arrays])


def _split(array, shapes):
    if len(shapes) == 1:
        return [array]
    ends = np.cumsum([math.prod(shape) for shape in shapes])
    parts = jnp.split(array, ends[:-1])
    return [part.reshape(shape) for part, shape in zip(parts, shapes, strict=True)]
