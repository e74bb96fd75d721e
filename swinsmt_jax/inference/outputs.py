"""What is there before a scan's results are written, and must not be lost unasked."""

import csv
from collections.abc import Collection, Mapping
from pathlib import Path
from xml.etree.ElementTree import ParseError

import nibabel as nib

from swinsmt_jax import checks
from swinsmt_jax.data import label_table
from swinsmt_jax.data.label_files import SUFFIXES, masks_in


def require_free(
    targets: Mapping[str, Mapping[str, Path]],
    scans: Mapping[str, Path],
    classes: Collection[str],
) -> None:
    """Raise `UserError` if an output would replace an input, or what is no mask.

    Args:
        targets: what would be written, by scan and kind.
        scans: the inputs.
        classes: names that masks may have.
    """
    inputs = {
        place: file
        for file in scans.values()
        for place in (file.resolve(), *file.resolve().parents)
    }
    for path in (path for files in targets.values() for path in files.values()):
        checks.require(
            path.resolve() not in inputs,
            f"{path} would be written, but is, or holds, the input "
            f"{inputs.get(path.resolve())}; choose another --output.",
        )
        others = set(path.iterdir()) if path.is_dir() else set()
        if others:
            masks = masks_in(path)
            others -= {file for name, file in masks.items() if name in classes}
        checks.require(
            not others,
            f"masks would be written to {path}, but it holds other files, such as "
            f"{min(map(str, others), default='')}; choose another --output.",
        )


def require_classes(
    targets: Mapping[str, Mapping[str, Path]], names: Collection[str]
) -> None:
    """Raise `UserError` if a target is there and about other classes than `names`."""
    for files in targets.values():
        for path in files.values():
            there = _classes_in(path)
            checks.require(
                there is None or there == set(names),
                f"{path} is there, of {len(there or ())} classes instead of the "
                f"{len(names)} wished; give --overwrite or another --output.",
            )


def _classes_in(path):
    """Return which classes an output is about; None if it does not say or is absent."""
    if path.is_dir():
        return set(masks_in(path))
    if not path.is_file():
        return None
    if path.suffix == ".csv":
        with path.open(newline="") as file:
            return {row.get("class") for row in csv.DictReader(file)}
    if not path.name.endswith(SUFFIXES):
        return None
    try:
        (content,) = (e.get_content() for e in nib.load(path).header.extensions)
        return set(label_table.read(content.decode()).values())
    except (nib.filebasedimages.ImageFileError, OSError, EOFError):
        return None  # damaged
    except (ValueError, AttributeError, ParseError):
        return None  # no table of names, or another tool's
