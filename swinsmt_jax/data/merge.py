"""Merge several stores into one with the classes of all.

Each case annotates the classes of its original store; see `losses.Loss`.
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from absl import logging

from swinsmt_jax import checks, class_map
from swinsmt_jax.class_map import ClassMap, class_key
from swinsmt_jax.data import meta, store
from swinsmt_jax.data.spacing import text
from swinsmt_jax.data.store import Options, StoredCase
from swinsmt_jax.labels import IGNORED
from swinsmt_jax.runtime import files

MADE = (
    "shape",
    "affine",
    "counts",
    "ignored",
    "cut",
    "boxes",
    "annotated",
)  # recomputed


@dataclass(frozen=True)
class Part:
    """A case of a store, as it enters the merged store.

    Attributes:
        case: in its own store.
        table: uint8 [256], from its label ids to the merged ones.
        origin: folder of its store, and a hash of the store's facts about it.
    """

    case: StoredCase
    table: np.ndarray
    origin: Sequence[str]


def merge(stores: Sequence[str | Path], root: str | Path) -> dict[str, int]:
    """Write the cases of several stores to one; return {class: cases that annotate it}.

    Classes are matched by name. Cases that share a name get their store's name as a
    prefix. Existing cases stay if they come from the same stores' cases.

    Raises:
        UserError: for fewer than two stores, an unfinished one, other voxels or another
            label resampling, too many classes, and a folder that contains other cases.
    """
    roots, root = [files.absolute(each) for each in stores], files.absolute(root)
    checks.require(
        len(roots) > 1 and len(set(roots)) == len(roots),
        f"stores is {checks.listed(map(str, stores))}, but must be two or more "
        "different stores.",
    )
    for each in roots:
        checks.require(
            store.is_store(each),
            f"{each} is not a store; make one of each dataset with preprocess.py.",
        )
    options = [store.read_options(each) for each in roots]
    for other, where in zip(options, roots, strict=True):
        for what in ("spacing", "label_resampling", "overlaps"):
            made, wanted = (
                text(getattr(o, what)) if what == "spacing" else getattr(o, what)
                for o in (other, options[0])
            )
            checks.require(
                made == wanted,
                f"the store {where} was made with --{what}={made}, but {roots[0]} with "
                f"{wanted}; preprocess one of them again.",
            )
    merged = replace(options[0], classes=_union([own.classes for own in options]))
    parts = _parts(roots, options, merged.classes)
    known = np.zeros(merged.classes.num_classes, int)
    with files.writable(root), store.opened(root, merged):
        for name, part in parts.items():
            files.remove_partial(root)
            known[_write(root, name, part, merged.classes)] += 1
        (root / meta.META).unlink(missing_ok=True)
        meta.add(root, {name: part.case.split for name, part in parts.items()})
        index = {
            **{"format": store.FORMAT, "options": merged.to_json()},
            "source": {"root": ", ".join(map(str, roots)), "description": "merged"},
            **{"folds": [], "failed": {}, "excluded": []},
            "run": {"cases": len(parts), "seconds": 0.0},
        }
        files.write_json(root / store.INDEX, index)
    return dict(zip(merged.classes.names[1:], known[1:].tolist(), strict=True))


def _union(maps: Sequence[ClassMap]) -> ClassMap:
    """Return the classes of all maps, each once, and their groups."""
    names = {class_key(n): n for own in reversed(maps) for n in own.names[:0:-1]}
    names = {class_key(n): names[class_key(n)] for own in maps for n in own.names[1:]}
    groups: dict[str, list[str]] = {}
    for own in maps:
        for group, members in own.names_by_group().items():
            found = groups.setdefault(group, [])
            found += [names[class_key(n)] for n in members]
            groups[group] = list(dict.fromkeys(found))
    return class_map.make([*names.values()], groups, where="the merged store")


def _parts(
    roots: Sequence[Path], options: Sequence[Options], classes: ClassMap
) -> Mapping[str, Part]:
    """Return the cases of all stores under their new names."""
    ids, found = classes.ids_by_key(), list[Part]()
    for root, own in zip(roots, options, strict=True):
        table = np.zeros(256, np.uint8)
        table[1 : own.classes.num_classes] = [
            ids[class_key(name)] for name in own.classes.names[1:]
        ]
        table[IGNORED] = IGNORED
        for split in meta.SPLITS:
            try:
                cases = store.find_cases(root, split=split)
            except meta.EmptySplitError:
                continue
            for case in cases:
                content = (case.folder / store.CASE).read_bytes()
                digest = hashlib.sha256(content).hexdigest()[:16]
                found.append(Part(case, table, [str(root), digest]))
    names = [part.case.name for part in found]
    parts = {}
    for part in found:
        name = part.case.name
        if names.count(name) > 1:
            name = f"{part.case.folder.parent.name}_{name}"
        checks.require(
            name not in parts,
            f"the stores have several cases that would be called {name!r}; rename the "
            "folder of a store.",
        )
        parts[name] = part
    renamed = [name for name, part in parts.items() if name != part.case.name]
    if renamed:
        logging.warning(
            "%d cases have the same name as one of another store; the name of their "
            "own store is put before it: %s",
            len(renamed),
            checks.few(renamed),
        )
    return parts


def _write(root, name, part, classes):
    """Write a case unless it exists; return the label ids that it annotates."""
    facts, folder = part.case.facts, root / name
    ids = facts.get("annotated", np.flatnonzero(part.table[:IGNORED]))
    known = sorted(set(part.table[ids].tolist()))
    if folder.exists() and store.damage(folder, whole=False) is None:
        if store.read_json(folder / store.CASE).get("merged") == list(part.origin):
            return known
    sample = part.case.read()
    everything = len(known) == classes.num_classes - 1
    sample = replace(
        sample,
        name=name,
        label=part.table[sample.label],
        annotated=None if everything else tuple(known),
    )
    facts = {key: value for key, value in facts.items() if key not in MADE}
    facts |= {"name": name, "merged": list(part.origin)}
    store.write_case(root, sample, num_classes=classes.num_classes, facts=facts)
    return known
