"""Names and colours of label ids as a header extension of NIfTI.

The extension is the XML label table of Connectome Workbench's caret format with code 0,
which 3D Slicer, ITK-SNAP's converters and TotalSegmentator's own tools read.
"""

import colorsys
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import nibabel as nib
import numpy as np

from swinsmt_jax import checks
from swinsmt_jax.class_map import ClassMap, class_key

GOLDEN = 0.6180339887  # turns of the colour circle between neighbouring ids


def xml(names: Mapping[int, str]) -> str:
    """Return the label table of {label id: name}."""
    root = ElementTree.Element("CaretExtension")
    volume = ElementTree.SubElement(root, "VolumeInformation", Index="0")
    table = ElementTree.SubElement(volume, "LabelTable")
    for number, name in names.items():
        red, green, blue = (f"{part:.3f}" for part in colour(number))
        label = ElementTree.SubElement(
            table,
            "Label",
            {
                "Key": str(number),
                "Red": red,
                "Green": green,
                "Blue": blue,
                "Alpha": "1",
            },
        )
        label.text = name
    ElementTree.SubElement(volume, "VolumeType").text = "Label"
    text = ElementTree.tostring(root, encoding="unicode")
    return '<?xml version="1.0" encoding="UTF-8"?>' + text


def read(text: str) -> dict[int, str]:
    """Return {label id: name} of a label table."""
    labels = ElementTree.fromstring(text.rstrip("\0")).iter("Label")
    return {int(label.attrib["Key"]): (label.text or "").strip() for label in labels}


def of_header(header: nib.Nifti1Header) -> dict[int, str]:
    """Return {label id: name} from a header, {} without a label table."""
    for extension in header.extensions:
        content = extension.get_content()
        try:
            text = content.decode() if isinstance(content, bytes) else str(content)
            return read(text)
        except (ElementTree.ParseError, ValueError, TypeError):
            continue  # something else, of another tool
    return {}


def ids_by_name(
    path: str | Path, array: np.ndarray, header: nib.Nifti1Header, classes: ClassMap
) -> np.ndarray:
    """Return a file's ids as those of the class map, by names in its header if any.

    Args:
        path: of the file, for messages.
        array: its ids, whole numbers.
        header: of the file.
        classes: the class map.

    Raises:
        UserError: for an id in the file whose name no class has, or that lacks a name
            while others differ from the class map's.
    """
    names, ids = of_header(header), classes.ids_by_key()
    wanted: dict[int, Any] = {
        i: ids.get(class_key(name)) for i, name in names.items() if i > 0
    }
    if all(i == number for i, number in wanted.items()):
        return array
    found = np.zeros(array.shape, np.uint8)
    for number in map(int, np.unique(array)):
        if number == 0:
            continue
        checks.require(
            number in names,
            f"{path} has voxels of the label id {number}, which its header does not "
            "name, although its other names differ from the class map; name it there.",
        )
        name, own = names[number], dict(enumerate(classes.names)).get(number)
        checks.require(
            wanted[number] is not None,
            f"{path} calls its label id {number} {name!r} in its header, but the class "
            f"map has {own!r} there and no class {name!r}."
            f"{checks.did_you_mean(name, classes.names)} Give labels of its classes.",
        )
        found[array == number] = wanted[number]
    return found


def colour(number: int) -> tuple[float, float, float]:
    """Return RGB in [0, 1] of a label id; neighbouring ids always differ clearly."""
    hue = float(np.mod(0.02 + number * GOLDEN, 1))
    saturation, value = (0.85, 0.55, 0.7)[number % 3], (1.0, 0.75)[number // 3 % 2]
    return colorsys.hsv_to_rgb(hue, saturation, value)
