"""Names and colours of label ids as a header extension of NIfTI.

The extension is the XML label table of Connectome Workbench's caret format with code 0,
which 3D Slicer, ITK-SNAP's converters and TotalSegmentator's own tools read.
"""

import colorsys
from collections.abc import Mapping
from xml.etree import ElementTree

import numpy as np

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
    return {int(label.get("Key")): label.text for label in labels}


def colour(number: int) -> tuple[float, float, float]:
    """Return RGB in [0, 1] of a label id; neighbouring ids never look alike."""
    hue = float(np.mod(0.02 + number * GOLDEN, 1))
    saturation, value = (0.85, 0.55, 0.7)[number % 3], (1.0, 0.75)[number // 3 % 2]
    return colorsys.hsv_to_rgb(hue, saturation, value)
