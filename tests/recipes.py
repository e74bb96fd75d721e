"""The code of docs/extending.md."""

import importlib.util
import re
import sys
import tempfile
from pathlib import Path
from types import ModuleType

FILE = Path(__file__).resolve().parents[1] / "docs" / "extending.md"


def code(section: str) -> str:
    """Return the one Python listing of a section."""
    text = FILE.read_text().partition(f"\n## {section}\n")[2].partition("\n## ")[0]
    (listing,) = re.findall(r"^```python\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    return listing


def load(section: str) -> ModuleType:
    """Write a section's listing to a file, and import that."""
    name = "recipe_of_" + section.lower().replace(" ", "_")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"{name}.py"
        path.write_text(code(section))
        spec = importlib.util.spec_from_file_location(name, path)
        module = sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    return module
