"""Every file imports only from lower layers; only some may import flax or jax."""

import ast
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
LAYERS = [
    ["checks"],
    ["network_config"],
    ["swin_config", "labels"],
    ["class_map"],
    ["config"],
    ["ops", "losses", "metrics", "data"],
    ["layers"],
    ["models"],
    ["sharding", "inference"],
    ["training", "portable"],
    ["convert"],
    ["evaluation"],
    ["prediction"],
]
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}
FLAX = {"layers", "models", "sharding", "training", "convert", "evaluation"}
FLAX |= {"prediction"}
JAXLESS = {
    "checks",
    "network_config",
    "swin_config",
    "config",
    "labels",
    "class_map",
    "data",
    "metrics",
}


def imports(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def package_files():
    for path in sorted((ROOT / "swinsmt_jax").rglob("*.py")):
        part = path.relative_to(ROOT / "swinsmt_jax").parts[0].removesuffix(".py")
        if part != "__init__":
            yield path, part


def test_every_part_has_a_layer():
    assert {part for _, part in package_files()} <= set(LEVEL)


def test_imports_go_down():
    for path, part in package_files():
        for name in imports(path):
            pieces = name.split(".")
            if pieces[0] == "swinsmt_jax" and len(pieces) > 1 and pieces[1] in LEVEL:
                other = pieces[1]
                lower = LEVEL[other] < LEVEL[part]
                assert other == part or lower, f"{path} imports {name}"


def test_flax_and_jax_stay_where_they_belong():
    for path, part in package_files():
        roots = {name.split(".")[0] for name in imports(path)}
        assert "flax" not in roots or part in FLAX, f"{path} imports flax"
        assert not roots & {"jax", "flax"} or part not in JAXLESS, path


def test_configs_import_only_ml_collections():
    for path in sorted((ROOT / "configs").glob("*.py")):
        roots = {name.split(".")[0] for name in imports(path)}
        assert roots <= {"ml_collections", "configs"}, path
