"""Sets of classes: TotalSegmentator's three, subsets of them, and users' own."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from swinsmt_jax import checks, labels

MAX_CLASSES = labels.IGNORED - 1  # label ids are uint8
# What a name must not have, to be part of file names and lists.
UNSAFE = "/\\:;,{}" + "".join(map(chr, (*range(32), *range(127, 160))))


@dataclass(frozen=True)
class ClassMap:
    """Names and groups of label ids.

    Attributes:
        names: index = label id; the first one is "background".
        groups: label ids of each group of the results table; may be empty.
    """

    names: tuple[str, ...]
    groups: Mapping[str, tuple[int, ...]] = field(default_factory=dict)

    @property
    def num_classes(self) -> int:
        """Number of label ids, background included."""
        return len(self.names)

    def ids_by_key(self) -> dict[str, int]:
        """Return {`class_key` of a name: label id}; of equal keys the first counts."""
        return {class_key(n): i for i, n in reversed([*enumerate(self.names)])}

    def names_by_group(self) -> dict[str, tuple[str, ...]]:
        """Return the groups with names of classes instead of ids."""
        return {g: tuple(self.names[i] for i in ids) for g, ids in self.groups.items()}

    def ids_of(self, names: Sequence[str], *, what: str) -> np.ndarray | None:
        """Return a table [256] from the label ids of `names` to this map's, by name.

        Classes that this map has not become background. None where ids are the same.

        Args:
            names: of the other label ids, the background first.
            what: they belong to, for the message.

        Raises:
            UserError: for a class of this map that `names` lack, with both lists.
        """
        keys = {class_key(name): i for i, name in enumerate(names)}
        lacking = [n for n in self.names[1:] if class_key(n) not in keys]
        checks.require(
            not lacking,
            f"{what} has no class {', '.join(lacking[:4])}"
            f"{', ...' if len(lacking) > 4 else ''}: its classes are "
            f"{', '.join(names[1:])}; the data have {', '.join(self.names[1:])}. Leave "
            "the others out (preprocess.py --classes), or rename them in the "
            "description.",
        )
        table = np.zeros(256, np.uint8)
        for number, name in enumerate(self.names):
            table[keys.get(class_key(name), 0)] = number
        table[0] = 0
        same = np.array_equal(table[: len(names)], np.arange(len(names)))
        return None if same else table

    def subset(self, kept: Sequence[str]) -> "ClassMap":
        """Return some of the classes, in this map's order, with ids from 1 on.

        Raises:
            UserError: for no class, a class named twice, and one that is unknown.
        """
        checks.require(len(kept) > 0, "the list of classes is empty; name at least one")
        kept = [name if name in self.names else safe_name(name) for name in kept]
        for name in kept:
            checks.one_of("a name of classes", name, self.names[1:])
            checks.require(
                list(kept).count(name) == 1, f"classes names {name!r} more than once."
            )
        names = (self.names[0], *(name for name in self.names[1:] if name in kept))
        ids = {name: i for i, name in enumerate(names)}
        groups = {
            group: tuple(ids[self.names[i]] for i in members if self.names[i] in ids)
            for group, members in self.groups.items()
        }
        return ClassMap(
            names, {group: found for group, found in groups.items() if found}
        )

    def left_right_swap(self) -> np.ndarray:
        """Return for each label id that of the other side's structure, or its own.

        uint8 [256]. Sides are words of a name (kidney_left, "Right kidney", kidney-L,
        LKidney, ctx-lh-insula, Eye_AL), or the first or last letter of a word where the
        name with the other letter is there too (lkid and rkid). What only one side of
        the body has stays as it is (`_one_of_its_kind`).

        Raises:
            UserError: for a name that has or may have a side, without exactly one
                counterpart, and for names that say nothing, as conversion gives them.
        """
        nameless = [name for name in self.names if re.fullmatch(r"class_\d+", name)]
        checks.require(
            not nameless,
            "right and left cannot be exchanged, since classes without known names, "
            f"such as {', '.join(nameless[:1])}, may have sides; disable mirroring, "
            "or name the classes in data.classes.",
        )
        words = [_words(name) for name in self.names]
        ids = {parts: number for number, parts in enumerate(words)}
        table, lone = np.arange(256, dtype=np.uint8), []
        for number, parts in enumerate(words):
            if _one_of_its_kind(parts):
                continue
            others = {ids[other] for other in _mirrored(parts) if other in ids}
            if len(others) == 1 and ids[parts] == number:
                (table[number],) = others
            elif others or _may_have_side(parts):
                lone.append(number)
        # L1 and R1 are ribs where L2 and R2 are there too, and else perhaps a vertebra.
        series = [re.sub(r"\d+", "#", " ".join(parts)) for parts in words]
        paired = {series[i] for i in range(len(words)) if table[i] != i}
        lone += [
            number
            for number, parts in enumerate(words)
            if table[number] == number
            and series[number] in paired
            and not _one_of_its_kind(parts)
        ]
        names = [self.names[number] for number in sorted(set(lone))]
        checks.require(
            not names,
            "right and left cannot be exchanged, since among the classes the other "
            f"side of {', '.join(names[:4])}{', ...' if len(names) > 4 else ''} is "
            "missing or occurs twice; disable mirroring, or name both sides alike "
            "(kidney_left, kidney_right).",
        )
        return table


_SIDES = {  # how words for sides are written: (left, right)
    "left": ("left", "l", "lt", "lft", "lh", "sinister", "sinistra"),
    "right": ("right", "r", "rt", "rgt", "rh", "dexter", "dextra"),
}
_SIDE = {word: side for side, words in _SIDES.items() for word in words}
_OTHER = {"left": "right", "right": "left", "l": "r", "r": "l"}
_PAIRED = "kid|lung|adr|eye|fem|hum|scap|clav|hip|breast|ovar|testi|psoas|parot|orbit"


def _words(name):
    """Return a name's words in lower case, those for sides written out."""
    parts = re.split(r"[\W_]+|(?<=[a-z])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", name)
    return tuple(_SIDE.get(part, part) for part in map(str.lower, parts) if part)


def _mirrored(words):
    """Return the words of names that the other side's structure may have.

    Where no word is or holds a side, one letter at an end of a word is exchanged.
    """
    swapped = tuple(
        re.sub("left|right", lambda found: _OTHER[found[0]], word) for word in words
    )
    if swapped != words:
        return [swapped]
    found = []
    for i, word in enumerate(words):
        first, last = _OTHER.get(word[0]), _OTHER.get(word[-1])
        ends = ([first + word[1:]] if first else []) + (
            [word[:-1] + last] if last else []
        )
        found += [(*words[:i], other, *words[i + 1 :]) for other in ends]
    return found


def _may_have_side(words):
    """Whether the spelling of a name suggests one side."""
    sided = rf"\w*(left|right)\w*|[apsi][lr]|[lr]({_PAIRED})\w*|({_PAIRED})[lr]"
    return any(re.fullmatch(sided, word) for word in words)


def _one_of_its_kind(words):
    """Whether a sided name is of a structure that the other side of the body lacks.

    The heart's chambers are not sides: the left ventricle of a mirrored heart still has
    the thick wall (those of the brain are called lateral). Only the right lung has a
    middle lobe.
    """
    heart = {"atrium", "atrial", "lv", "rv", "la", "ra"} & {*words} or (
        "ventricle" in words and "lateral" not in words
    )
    return bool(heart) or {"middle", "lobe"} <= {*words}


def class_key(name: str) -> str:
    """Return what two spellings of a class' name share: its words in lower case."""
    return re.sub(r"[\W_]+", "_", name).strip("_").casefold()


def safe_name(name: str) -> str:
    """Return a class' name as part of a file name: prostate_uterus, prostate/uterus."""
    return re.sub(rf"\s*[{re.escape(UNSAFE)}]+\s*", "_", name).strip(". ")


def make(
    names: Sequence[str], groups: Mapping[str, Sequence[str]], *, where: str
) -> ClassMap:
    """Build the map of classes named from id 1 on, with groups of names.

    What file names cannot have becomes _: a dataset's names are not the user's to
    change.

    Raises:
        UserError: for names that are empty or repeated, too many of them, and groups
            of unknown classes; the message begins with `where`.
    """
    checks.require(
        isinstance(names, Sequence)
        and not isinstance(names, str)
        and 1 <= len(names) <= MAX_CLASSES,
        f"{where}: classes is {names!r}, but must be a list of 1 to "
        f"{MAX_CLASSES} names.",
    )
    checks.require(
        all(isinstance(name, str) and safe_name(name).strip("_") for name in names),
        f"{where}: classes is {list(names)!r}, but each must be a name with letters or "
        "digits.",
    )
    given, names = list(names), []
    for number, name in enumerate(given, start=1):
        safe = safe_name(name)
        taken = safe != name and safe in (*given, *names)
        names.append(f"{safe}_{number}" if taken else safe)
    for name in names:
        checks.file_name(f"{where}: a name of classes", name)
        checks.require(
            name != "background" and names.count(name) == 1,
            f"{where}: classes holds {name!r} more than once, or the background, which "
            "is id 0 without being named.",
        )
    found = {}
    checks.require(
        isinstance(groups, Mapping),
        f"{where}: groups is {groups!r}, but must be {{group: [class names]}}.",
    )
    for group, members in groups.items():
        checks.group_name(f"{where}: groups", group)
        checks.require(
            isinstance(members, (list, tuple)) and len(members) > 0,
            f"{where}: the group {group!r} is {members!r}, but must list names.",
        )
        for name in members:
            checks.one_of(f"{where}: a class of the group {group!r}", name, given)
        found[group] = tuple(given.index(name) + 1 for name in members)
    return ClassMap(("background", *names), found)


def to_json(classes: ClassMap) -> str | dict:
    """Return what `from_json` reads: a version's name, or names and groups."""
    for version, known in VERSIONS.items():
        if classes == known:
            return version
    groups = {group: list(names) for group, names in classes.names_by_group().items()}
    return {"names": list(classes.names[1:]), "groups": groups}


def from_json(content: str | dict, *, where: str) -> ClassMap:
    """Read a class map; a `UserError` for a version unknown or a bad list."""
    if isinstance(content, str):
        checks.one_of(f"{where}: the class map", content, VERSIONS)
        return VERSIONS[content]
    return make(content["names"], content["groups"], where=where)


def _v1() -> ClassMap:
    """The 104 classes of TotalSegmentator's first dataset (zenodo.org/records/6802614).

    Groups are the second version's, by name; the heart's chambers and the pulmonary
    artery stand with the vessels, the face in none.
    """
    sides = ("left", "right")
    spine = [
        f"vertebrae_{part}{i}"
        for part, count in (("L", 5), ("T", 12), ("C", 7))
        for i in range(count, 0, -1)
    ]
    lobe = "upper_lobe_left lower_lobe_left upper_lobe_right middle_lobe_right"
    lobes = [f"lung_{name}" for name in (*lobe.split(), "lower_lobe_right")]
    part = "myocardium atrium_left ventricle_left atrium_right ventricle_right"
    chambers = [f"heart_{name}" for name in part.split()]
    gluteus = [f"gluteus_{x}" for x in ("maximus", "medius", "minimus")]
    bones = ("humerus", "scapula", "clavicula", "femur", "hip")

    def both(names):
        return [f"{name}_{side}" for name in names for side in sides]

    names = [
        *("spleen", "kidney_right", "kidney_left", "gallbladder", "liver", "stomach"),
        *("aorta", "inferior_vena_cava", "portal_vein_and_splenic_vein", "pancreas"),
        *("adrenal_gland_right", "adrenal_gland_left", *lobes, *spine),
        *("esophagus", "trachea", *chambers, "pulmonary_artery", "brain"),
        *both(("iliac_artery", "iliac_vena")),
        *("small_bowel", "duodenum", "colon"),
        *(f"rib_{side}_{i}" for side in sides for i in range(1, 13)),
        *(*both(bones), "sacrum", "face"),
        *both((*gluteus, "autochthon", "iliopsoas")),
        "urinary_bladder",
    ]
    groups = {
        group: [labels.CLASS_NAMES[i] for i in ids if labels.CLASS_NAMES[i] in names]
        for group, ids in labels.GROUPS.items()
    }
    groups["vessels"] += [*chambers, "pulmonary_artery"]
    return make(names, groups, where="v1")


V2 = ClassMap(labels.CLASS_NAMES, labels.GROUPS)
# Of TotalSegmentator 2.18: a sixth lumbar instead of the first sacral vertebra.
_V3 = [name.replace("vertebrae_S1", "vertebrae_L6") for name in labels.CLASS_NAMES]
TOTAL_V3 = ClassMap(tuple(_V3), labels.GROUPS)
VERSIONS = {labels.VERSION: V2, "v1": _v1(), "total_v3": TOTAL_V3}
