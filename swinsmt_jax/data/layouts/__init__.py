"""The layouts of datasets: each is one file of this folder, found automatically.

A layout's module has

    TITLE                                    what it looks like, for messages
    fits(root, content) -> bool              whether a folder has this layout
    read(root, content, *, where) -> Dataset

where `content` is the JSON object that describes the dataset, {} without one, and
`where` its file. docs/extending.md has an example.
"""

import importlib
import pkgutil
from pathlib import Path
from types import ModuleType

GENERAL = ("described", "totalsegmentator")  # what no other layout fits is theirs


def recognised(root: Path, content: dict) -> ModuleType:
    """Return the layout of a dataset."""
    names = [module.name for module in pkgutil.iter_modules(__path__)]
    names = sorted(set(names) - set(GENERAL)) + [*GENERAL]
    layouts = (importlib.import_module(f"{__name__}.{name}") for name in names)
    return next(layout for layout in layouts if layout.fits(root, content))
