"""Names and colours of label ids for 3D Slicer, ITK-SNAP and NiiVue."""

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


def niivue(names: Mapping[int, str]) -> dict[str, list]:
    """Return NiiVue's label table, for `set_colormap_label` of ipyniivue.

    NiiVue takes names by position where ids have no gap, so all ids from 0 on are
    given, in order; those without a name are clear.
    """
    ids = range(max(names, default=0) + 1)
    rgb = [[round(255 * part) for part in colour(i)] if i else [0] * 3 for i in ids]
    red, green, blue = (list(part) for part in zip(*rgb, strict=True))
    return {
        **{"R": red, "G": green, "B": blue, "I": list(ids)},
        "A": [255 if i in names else 0 for i in ids],
        "labels": [names.get(i, "") for i in ids],
    }


def _rgb(number):
    return " ".join(str(round(255 * part)) for part in colour(number))
