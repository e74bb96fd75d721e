"""Every file imports only from lower layers; only some may import flax or jax."""

import ast
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
LAYERS = [  # a file belongs to the longest of these names that its own begins with
    ["configs"],
    ["checks"],
    [
        "runtime.csv_text",
        "runtime.files",
        "runtime.html",
        "runtime.plain",
        "runtime.host_memory",
        "runtime.workers",
    ],
    ["models.registry", "labels", "runtime.cluster"],
    ["class_map"],
    ["data.sample", "data.interpolation", "data.spacing"],
    ["data.augmentation"],
    ["config"],
    ["ops", "data"],
    ["layers", "phantoms", "results"],
    ["models"],
    ["sharding"],
    ["runtime"],
    ["training"],
    ["convert"],
    ["inference"],
    ["evaluation"],
    ["commands"],
    ["cli"],
]
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}
FLAX = {"layers", "models", "sharding", "training", "convert", "evaluation"}
FLAX |= {"inference", "runtime"}
JAXLESS = {
    "checks",
    "models.registry",
    "config",
    "labels",
    "class_map",
    "data",
    "phantoms",
    "results",
}


def imports(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def layer_of(dotted):
    """Return the layer's name for a file such as "runtime.files"."""
    fits = [n for n in LEVEL if dotted == n or dotted.startswith(n + ".")]
    return max(fits, key=len, default=None)


def package_files():
    for path in sorted((ROOT / "swinsmt_jax").rglob("*.py")):
        pieces = path.relative_to(ROOT / "swinsmt_jax").with_suffix("").parts
        if pieces not in {("__init__",), ("__main__",)}:
            yield path, layer_of(".".join(p for p in pieces if p != "__init__"))


def test_every_part_has_a_layer():
    assert not [path for path, layer in package_files() if layer is None]


def test_imports_go_down():
    for path, layer in package_files():
        for name in imports(path):
            other = layer_of(name.removeprefix("swinsmt_jax."))
            if name.startswith("swinsmt_jax.") and other is not None:
                lower = LEVEL[other] < LEVEL[layer]
                assert other == layer or lower, f"{path} imports {name}"


def test_flax_and_jax_stay_where_they_belong():
    for path, part in package_files():
        roots = {name.split(".")[0] for name in imports(path)}
        room = part.split(".")[0]
        assert "flax" not in roots or room in FLAX, f"{path} imports flax"
        jaxless = room in JAXLESS or part in JAXLESS
        assert not (jaxless and roots & {"jax", "flax"}), path


def unannotated(node, public=True):
    """Yield the public functions and methods that lack a type."""
    for child in ast.iter_child_nodes(node):
        named = not child.name.startswith("_") if hasattr(child, "name") else False
        if isinstance(child, ast.ClassDef):
            yield from unannotated(child, public and named)
        elif isinstance(child, ast.FunctionDef):
            made = child.name == "__init__"
            a = child.args
            given = [*a.posonlyargs, *a.args, *a.kwonlyargs, a.vararg, a.kwarg]
            given = [arg for arg in given if arg and arg.arg not in ("self", "cls")]
            whole = all(arg.annotation for arg in given) and (made or child.returns)
            if public and (named or made or child.name == "__call__") and not whole:
                yield child.name


def test_public_functions_are_annotated():
    for path, _ in package_files():
        assert not list(unannotated(ast.parse(path.read_text()))), path


def test_configs_import_only_ml_collections():
    for path in sorted((ROOT / "swinsmt_jax/configs").glob("*.py")):
        for name in imports(path):
            assert name.startswith(("ml_collections.", "swinsmt_jax.configs.")), path
