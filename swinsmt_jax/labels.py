"""The 117 classes of TotalSegmentator-V2 and the five groups of the paper's table.

The class map is versioned: later TotalSegmentator releases carry other classes under
the same ids. The groups are the five parts of TotalSegmentator's own class map, with
its "cardiac" part read as vessels, the name in the authors' table. Which classes
are in each is not published, so a user can replace them (`load_groups`).
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from swinsmt_jax import checks
from swinsmt_jax.runtime.files import absolute, read_json

IGNORED = 255  # label of voxels that are not annotated
VERSION = "v2"
RECORD = "https://zenodo.org/records/10047292"  # TotalSegmentator-V2, dataset v2.0.1

_NAMES = """
    background spleen kidney_right kidney_left gallbladder liver stomach pancreas
    adrenal_gland_right adrenal_gland_left lung_upper_lobe_left lung_lower_lobe_left
    lung_upper_lobe_right lung_middle_lobe_right lung_lower_lobe_right esophagus
    trachea thyroid_gland small_bowel duodenum colon urinary_bladder prostate
    kidney_cyst_left kidney_cyst_right sacrum vertebrae_S1 vertebrae_L5 vertebrae_L4
    vertebrae_L3 vertebrae_L2 vertebrae_L1 vertebrae_T12 vertebrae_T11 vertebrae_T10
    vertebrae_T9 vertebrae_T8 vertebrae_T7 vertebrae_T6 vertebrae_T5 vertebrae_T4
    vertebrae_T3 vertebrae_T2 vertebrae_T1 vertebrae_C7 vertebrae_C6 vertebrae_C5
    vertebrae_C4 vertebrae_C3 vertebrae_C2 vertebrae_C1 heart aorta pulmonary_vein
    brachiocephalic_trunk subclavian_artery_right subclavian_artery_left
    common_carotid_artery_right common_carotid_artery_left brachiocephalic_vein_left
    brachiocephalic_vein_right atrial_appendage_left superior_vena_cava
    inferior_vena_cava portal_vein_and_splenic_vein iliac_artery_left
    iliac_artery_right iliac_vena_left iliac_vena_right humerus_left humerus_right
    scapula_left scapula_right clavicula_left clavicula_right femur_left femur_right
    hip_left hip_right spinal_cord gluteus_maximus_left gluteus_maximus_right
    gluteus_medius_left gluteus_medius_right gluteus_minimus_left
    gluteus_minimus_right autochthon_left autochthon_right iliopsoas_left
    iliopsoas_right brain skull rib_left_1 rib_left_2 rib_left_3 rib_left_4
    rib_left_5 rib_left_6 rib_left_7 rib_left_8 rib_left_9 rib_left_10 rib_left_11
    rib_left_12 rib_right_1 rib_right_2 rib_right_3 rib_right_4 rib_right_5
    rib_right_6 rib_right_7 rib_right_8 rib_right_9 rib_right_10 rib_right_11
    rib_right_12 sternum costal_cartilages
"""

CLASS_NAMES: tuple[str, ...] = tuple(_NAMES.split())  # index = label id
NUM_CLASSES = len(CLASS_NAMES)  # 118, background included
CLASS_IDS: dict[str, int] = {name: i for i, name in enumerate(CLASS_NAMES)}

GROUPS: dict[str, tuple[int, ...]] = {
    "organs": tuple(range(1, 25)),
    "vertebrae": tuple(range(25, 51)),
    "muscles": tuple(range(69, 92)),
    "ribs": tuple(range(92, 118)),
    "vessels": tuple(range(51, 69)),
}


def class_name(number: int, names: Sequence[str] = CLASS_NAMES) -> str:
    """Name of a class id; a network may have more classes than the class map."""
    return names[number] if number < len(names) else f"class_{number}"


def names_by_id(names: Sequence[str], *, num_classes: int) -> dict[int, str]:
    """Names of the label ids that a network gives, background left out."""
    return {i: class_name(i, names) for i in range(1, num_classes)}


def load_groups(
    path: str | Path, *, names: Sequence[str] = CLASS_NAMES
) -> dict[str, tuple[int, ...]]:
    """Read groups of classes from a JSON object {group: [label ids or class names]}.

    A class may belong to several groups, but only once to each. `names` are those of
    the label ids, the background first.

    Raises:
        UserError: when the file is missing or not such an object; the message names
            the group and the entry.
    """
    path = absolute(path)
    checks.require(
        path.is_file(),
        f"groups file {path} does not exist; expected a JSON object such as "
        '{"organs": ["spleen", 5]}.',
    )
    try:
        groups = read_json(path)
    except ValueError as error:
        raise checks.UserError(f"groups file {path} is not JSON: {error}.") from error
    checks.require(
        isinstance(groups, dict) and len(groups) > 0,
        f"groups file {path} holds {type(groups).__name__}, but must hold an object "
        "with at least one group: {group: [label ids or class names]}.",
    )
    for name in groups:
        checks.group_name(f"groups file {path}", name)
    return {
        name: _label_ids(name, entries, path, names) for name, entries in groups.items()
    }


def _label_ids(group, entries, path, names) -> tuple[int, ...]:
    where = f"group {group!r} of {path}"
    checks.require(
        isinstance(entries, list) and len(entries) > 0,
        f"{where} is {entries!r}, but must be a list of at least one class.",
    )
    ids = tuple(_label_id(entry, where, names) for entry in entries)
    twice = sorted({names[i] for i in ids if ids.count(i) > 1})
    checks.require(not twice, f"{where} names {', '.join(twice)} more than once.")
    return ids


def _label_id(entry: Any, where: str, names: Sequence[str]) -> int:
    if isinstance(entry, str):
        title = f"TotalSegmentator {VERSION}" if names == CLASS_NAMES else "the dataset"
        checks.require(
            entry in names[1:],
            f"{where} names {entry!r}, which is none of the {len(names) - 1} classes "
            f"of {title}.{checks.did_you_mean(entry, names[1:])}",
        )
        return names.index(entry)
    checks.require(
        type(entry) is int and 1 <= entry < len(names),
        f"{where} holds {entry!r}, but a label id is a whole number from 1 to "
        f"{len(names) - 1}.",
    )
    return entry
