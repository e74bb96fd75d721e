"""Does a segmentation look like a body? Warnings, each with structure and reason.

Names are those of TotalSegmentator; a structure with another name is only checked for
what does not depend on names (the edge of the scan, its usual volume).
"""

import csv
import functools
import json
import re
from collections.abc import Iterator
from importlib import resources
from typing import NamedTuple

import numpy as np
from scipy import ndimage

from swinsmt_jax.class_map import class_key
from swinsmt_jax.results.result import Result

APART = 0.01  # share of a structure that may lie apart from its largest piece
GAP = 1.7  # distance of two neighbours, over the median of their kind
BODY = -300.0  # HU, above which voxels are of the body
FACES = (("left", "right"), ("back", "front"), ("lower", "upper"))
SPINE = re.compile(r"vertebrae_([ctls])(\d+)$")
RIB = re.compile(r"rib_(left|right)_(\d+)$")
SIDED = re.compile(r"(?:^|_)(left|right)(?:_|$)")
RARE = ("vertebrae_l6",)  # most bodies have none
WRONG = 0.75  # share of a structure on the other side; some vessels cross the midline
LEVELS = {"c": 0, "t": 7, "l": 19, "s": 25}  # bones of the spine above


class QualityWarning(NamedTuple):
    """What is unusual about a structure.

    Attributes:
        check: "pieces", "volume", "order", "gap", "side" or "cut".
        structure: its name.
        reason: a sentence.
    """

    check: str
    structure: str
    reason: str


def check(result: Result) -> list[QualityWarning]:
    """Return what is unusual about the structures of a scan."""
    return [
        *_pieces(result),
        *_volumes(result),
        *_sequences(result),
        *_sides(result),
        *_cut(result),
    ]


def as_json(result: Result) -> str:
    """Return the warnings as JSON, and which structures are not there.

    "with_usual_volume" counts those whose volume could be compared.
    """
    names = result.names
    content = {
        "scan": str(result.volume.path),
        "warnings": [found._asdict() for found in check(result)],
        "absent": [names[i] for i in names if i not in result.boxes],
        "with_usual_volume": len(set(names.values()) & set(result.usual_ml)),
    }
    return json.dumps(content, indent=1) + "\n"


@functools.cache
def single() -> dict[str, str]:
    """Return {structure: reason} of those that are one piece by nature."""
    table = resources.files("swinsmt_jax.results") / "single_structures.csv"
    rows = csv.DictReader(table.read_text().splitlines())
    return {row["structure"]: row["reason"] for row in rows}


def clean(result: Result) -> tuple[np.ndarray, dict[str, int]]:
    """Keep the largest piece of the structures that are one piece by nature.

    Returns:
        Labels, and {structure: voxels removed}.
    """
    labels, removed = result.labels.copy(), {}
    for number, name in result.names.items():
        if number not in result.boxes or class_key(name) not in single():
            continue
        _, apart = _apart(result, number)
        if count := int(np.count_nonzero(apart)):
            labels[result.boxes[number]][apart] = 0
            removed[name] = count
    return labels, removed


def _apart(result, number):
    """Return how many pieces a structure has, and which voxels lie apart, in its box.

    A piece at the edge of the scan does not: what joins it may lie outside.
    """
    box = result.boxes[number]
    pieces, _ = ndimage.label(result.mask(number), structure=np.ones((3, 3, 3)))
    sizes = np.bincount(pieces.ravel())
    sizes[0] = 0
    kept = {0, int(sizes.argmax())}
    for axis, (part, size) in enumerate(zip(box, result.labels.shape, strict=True)):
        planes = np.moveaxis(pieces, axis, 0)
        kept |= set(planes[0].flat) if part.start == 0 else set()
        kept |= set(planes[-1].flat) if part.stop == size else set()
    return len(sizes) - 1, ~np.isin(pieces, list(kept))


def _pieces(result) -> Iterator[QualityWarning]:
    for number in result.boxes:
        name = result.names[number]
        if class_key(name) not in single():
            continue
        count, apart = _apart(result, number)
        voxels = np.count_nonzero(result.mask(number))
        share = np.count_nonzero(apart) / voxels
        if share > APART:
            yield QualityWarning(
                "pieces",
                name,
                f"{name} is in {count} pieces; {share:.1%} of its "
                f"{voxels * result.voxel_ml:.1f} ml lie apart from the largest.",
            )


def _volumes(result) -> Iterator[QualityWarning]:
    cut = {found.structure for found in _cut(result)}
    for number in result.boxes:
        name = result.names[number]
        low, high = result.usual_ml.get(name, (0.0, np.inf))
        volume = np.count_nonzero(result.mask(number)) * result.voxel_ml
        if volume > high or (volume < low and name not in cut):
            yield QualityWarning(
                "volume",
                name,
                f"{name} has {volume:.1f} ml; 98 % of those of the training set have "
                f"from {low:.1f} to {high:.1f} ml.",
            )


def _sequences(result) -> Iterator[QualityWarning]:
    """Check order and gaps of vertebrae and ribs, from head to foot."""
    rows: dict[str, dict[int, int]] = {}
    for number, name in result.names.items():
        key = class_key(name)
        if found := SPINE.fullmatch(key):
            place = LEVELS[found[1]] + int(found[2])
            rows.setdefault("vertebra", {})[place] = number
        elif found := RIB.fullmatch(key):
            rows.setdefault(f"{found[1]} rib", {})[int(found[2])] = number
    cut = {found.structure for found in _cut(result)}
    for kind, numbers in rows.items():
        yield from _sequence(result, kind, dict(sorted(numbers.items())), cut)


def _sequence(result, kind, numbers, cut):
    """Check a row of bones; what the scan cuts has no place that could be compared."""
    there = [
        place
        for place, number in numbers.items()
        if number in result.boxes and result.names[number] not in cut
    ]
    heights = [_height(result, numbers[place], kind) for place in there]
    steps = -np.diff(heights)
    usual = np.median(steps) if len(steps) else 0.0
    for upper, lower, step in zip(there, there[1:], steps, strict=False):
        one, other = (result.names[numbers[place]] for place in (upper, lower))
        missing = [
            p
            for p in numbers
            if upper < p < lower and class_key(result.names[numbers[p]]) not in RARE
        ]
        if step <= 0:
            yield QualityWarning(
                "order", other, f"{other} lies {-step:.0f} mm above {one}, not below."
            )
        for place in missing:
            name = result.names[numbers[place]]
            yield QualityWarning(
                "gap", name, f"{name} is missing between {one} and {other}."
            )
        if not missing and len(steps) > 2 and step > GAP * usual > 0:
            yield QualityWarning(
                "gap",
                other,
                f"{other} lies {step:.0f} mm below {one}; others of its kind follow "
                f"after {usual:.0f} mm.",
            )


def _height(result, number, kind):
    """Return the height in mm of a vertebra, or of the back quarter of a rib."""
    places = _places(result, number)
    if kind != "vertebra":  # the front ends of ribs are not in order
        places = places[places[:, 1] <= np.quantile(places[:, 1], 0.25)]
    return places[:, 2].mean()


def _sides(result) -> Iterator[QualityWarning]:
    """Check that what is called left lies to the left of the body's midline."""
    midline = None
    for number in result.boxes:
        name = result.names[number]
        sides = SIDED.findall(class_key(name))
        if len(sides) != 1:
            continue
        if midline is None:
            midline = _midline(result)
        places = _places(result, number)
        off = places[:, 0] - midline(places[:, 2])
        wrong = np.mean(off > 0 if sides[0] == "left" else off < 0)
        if wrong > WRONG:
            other = "right" if sides[0] == "left" else "left"
            yield QualityWarning(
                "side",
                name,
                f"{wrong:.0%} of {name} lie to the {other} of the body's midline.",
            )


def _midline(result):
    """Return x of the midline in mm as a function of the height in mm.

    It is that of the spine, where labels show one, else that of the whole body.
    """
    spine = [
        number
        for number in result.boxes
        if SPINE.fullmatch(class_key(result.names[number]))
        or class_key(result.names[number]) == "spinal_cord"
    ]
    if spine:
        centres = np.array([_places(result, n).mean(0) for n in spine])
        order = np.argsort(centres[:, 2])
        heights, middle = centres[order, 2], centres[order, 0]
        return lambda z: np.interp(z, heights, middle)
    across = (result.volume.array > BODY).any(axis=2).sum(axis=1)
    middle = (np.arange(len(across)) * across).sum() / max(across.sum(), 1)
    centre = result.to_mm(np.array([[middle, *np.array(result.labels.shape[1:]) / 2]]))
    return lambda z: np.full(len(z), centre[0, 0])


def _places(result, number):
    """Return the places in mm of a structure's voxels, [n, 3]."""
    start = [part.start for part in result.boxes[number]]
    return result.to_mm(np.argwhere(result.mask(number)) + start)


def _cut(result) -> Iterator[QualityWarning]:
    for number, box in result.boxes.items():
        faces = [
            name
            for part, size, names in zip(box, result.labels.shape, FACES, strict=True)
            for name, there in zip(
                names, (part.start == 0, part.stop == size), strict=True
            )
            if there and size > 1
        ]
        if faces:
            name = result.names[number]
            yield QualityWarning(
                "cut",
                name,
                f"{name} reaches the {' and the '.join(faces)} edge of the scan, so "
                "part of it may be missing.",
            )
