"""Names and colours of label ids for 3D Slicer and ITK-SNAP."""

from collections.abc import Mapping

from swinsmt_jax.data.label_table import colour


def slicer(names: Mapping[int, str]) -> str:
    """Return 3D Slicer's colour table (.ctbl): id, name, RGBA from 0 to 255."""
    rows = [
        f"{number} {name.replace(' ', '_')} {_rgb(number)} 255"
        for number, name in names.items()
    ]
    return "\n".join(
        ["# label ids, names and colours", "0 background 0 0 0 0", *rows, ""]
    )


def itk_snap(names: Mapping[int, str]) -> str:
    """Return ITK-SNAP's label descriptions: id, RGB, alpha, visible, mesh, name."""
    rows = [f'{number} {_rgb(number)} 1 1 1 "{name}"' for number, name in names.items()]
    return "\n".join(['0 0 0 0 0 0 0 "Clear Label"', *rows, ""])


def _rgb(number):
    return " ".join(str(round(255 * part)) for part in colour(number))
