"""The way of the config through the package, read from the source by `ast`.

`benchmarks.paths` says what is counted. A call is followed where names, imports and
annotations tell which function it calls. What an expression holds of the config is
"whole", "group" (a dataclass such as `config.data`), "value" (whatever is made of a
group's fields), or the (module, name) of a dataclass with a config among its fields.
"""

import ast
from pathlib import Path

WHOLE = "ExperimentConfig"
TOP = ""  # the room of the scripts and of the files that lie beside the rooms


def follow(root: Path, *, start: tuple[str, str]) -> dict[str, int]:
    """Follow the config from a function (module, name) on; return the counts."""
    source, stays, steps = _Source(root), {}, {}
    _Walk(source, stays, steps).visit(start, {}, {TOP})
    held = [v for (module, _), v in stays.items() if not module.endswith(".checks")]
    moves = {
        (a, b): rooms for (a, b), rooms in steps.items() if room(a[0]) != room(b[0])
    }
    return {
        "stays": len(held),
        "stays_of_the_whole": sum(bool(v - {"group", "value"}) for v in held),
        "moves": len(moves),
        "climbs": sum(room(b[0]) in rooms for (_, b), rooms in moves.items()),
    }


def room(module: str) -> str:
    """Return the package below swinsmt_jax that holds a module."""
    parts = module.split(".")
    return parts[1] if len(parts) > 2 else TOP


class _Source:
    """Functions, classes and imports of the scripts and the package, by module."""

    def __init__(self, root: Path):
        self.functions, self.classes, self.imports = {}, {}, {}
        files = sorted([*root.glob("*.py"), *(root / "swinsmt_jax").rglob("*.py")])
        self.modules = {
            ".".join(file.relative_to(root).with_suffix("").parts): file
            for file in files
        }
        for module, file in self.modules.items():
            tree = ast.parse(file.read_text())
            self.index(module, tree.body, "")
            self.imports[module] = {}
            for node in ast.walk(tree):
                if isinstance(node, ast.ImportFrom):
                    self.add_import(module, node)

    def index(self, module, body, prefix):
        for node in body:
            if isinstance(node, ast.FunctionDef):
                self.functions[module, prefix + node.name] = node
            elif isinstance(node, ast.ClassDef):
                self.classes[module, node.name] = node
                self.index(module, node.body, f"{node.name}.")

    def add_import(self, module, node):
        for alias in node.names:
            target = self.file(f"{node.module}.{alias.name}")
            place = self.file(node.module), alias.name
            self.imports[module][alias.asname or alias.name] = target or place

    def file(self, name):
        found = [n for n in (name, f"{name}.__init__") if n in self.modules]
        return found[0] if found else None

    def find(self, module, node):
        """Return the (module, name) of the function or class that a node names."""
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            module, name = self.imports[module].get(node.value.id), node.attr
        else:
            name = getattr(node, "id", None)
        while isinstance(module, str):
            if (module, name) in self.functions or (module, name) in self.classes:
                return module, name
            module, name = self.imports[module].get(name) or (None, None), name
            if isinstance(module, tuple):
                module, name = module
        return None

    def annotated(self, module, node):
        """Return what a parameter or field with this annotation holds."""
        for part in ast.walk(node) if node else ():
            name = getattr(part, "id", getattr(part, "attr", ""))
            if name.endswith("Config"):
                return "whole" if name == WHOLE else "group"
        found = self.find(module, node)
        return found if found in self.classes and self.fields(found) else None

    def fields(self, cls):
        """Return what the fields of a dataclass hold, for those that hold a config."""
        found = {
            node.target.id: self.annotated(cls[0], node.annotation)
            for node in self.classes[cls].body
            if isinstance(node, ast.AnnAssign)
        }
        return {name: held for name, held in found.items() if held}

    def parameters(self, place):
        """Return the positional and all parameters of a function, as `ast.arg`."""
        arguments = self.functions[place].args
        positional = [*arguments.posonlyargs, *arguments.args]
        return positional, [*positional, *arguments.kwonlyargs]


class _Walk:
    """A walk through the calls: writes functions into `stays`, calls into `steps`."""

    def __init__(self, source: _Source, stays: dict, steps: dict):
        self.source, self.stays, self.steps, self.results = source, stays, steps, {}

    def visit(self, place, held, rooms):
        """Go through a function whose parameters hold this; return what it returns."""
        key = place, *sorted(held.items(), key=str)
        if key not in self.results:
            self.results[key] = None  # for a function that calls itself
            if held:
                kinds = {str(kind) for kind in held.values()}
                self.stays.setdefault(place, set()).update(kinds)
            body = _Body(self, place, dict(held), {*rooms, room(place[0])})
            body.run(self.source.functions[place].body)
            self.results[key] = body.result
        return self.results[key]


class _Body:
    """One function's statements, and what its names hold."""

    def __init__(self, walk: _Walk, place: tuple[str, str], names: dict, rooms: set):
        self.walk, self.place, self.names, self.rooms = walk, place, names, rooms
        self.source, self.module, self.result = walk.source, place[0], None

    def run(self, statements):
        for statement in statements:
            self.take(statement)

    def take(self, node):
        """Take a statement or a part of one: its expressions, then what is in it."""
        if isinstance(node, ast.expr):
            self.held(node)
        elif isinstance(node, ast.Assign):
            for target in node.targets:
                self.assign(target, node.value)
        elif isinstance(node, ast.withitem) and node.optional_vars:
            self.assign(node.optional_vars, node.context_expr)
        elif isinstance(node, ast.Return):
            self.result = self.held(node.value) or self.result
        else:
            for part in ast.iter_child_nodes(node):
                self.take(part)

    def assign(self, target, value):
        if isinstance(target, ast.Tuple) and isinstance(value, ast.Tuple):
            for one, its in zip(target.elts, value.elts, strict=False):
                self.assign(one, its)
        elif (held := self.held(value)) and isinstance(target, ast.Name):
            self.names[target.id] = held

    def held(self, node):
        """Return what an expression holds; the calls in it become steps."""
        match node:
            case None:
                return None
            case ast.Name(id=name):
                return self.names.get(name)
            case ast.Attribute(value=value, attr=name):
                return self.attribute(self.held(value), name)
            case ast.Lambda(body=body):
                return self.held(body)
            case ast.IfExp(test=test, body=body, orelse=orelse):
                self.held(test)
                found = self.held(body), self.held(orelse)
                return found[0] or found[1]
            case ast.Call():
                return self.call(node)
        return "value" if self.parts(node) else None

    def parts(self, node):
        """Return whether any part holds something; all parts are taken."""
        found = [
            self.held(part) if isinstance(part, ast.expr) else self.parts(part)
            for part in ast.iter_child_nodes(node)
        ]
        return any(found)

    def attribute(self, held, name):
        if isinstance(held, tuple):
            return self.source.fields(held).get(name)
        return {"whole": "group", "group": "value", "value": "value"}.get(held)

    def call(self, node):
        held = [self.held(argument) for argument in node.args]
        by_name = {k.arg: self.held(k.value) for k in node.keywords}
        for argument in [*node.args, *(k.value for k in node.keywords)]:
            self.hand_over(argument)
        name = ast.unparse(node.func).split(".")[-1]
        if name in ("replace", "together"):  # a changed config; a function's result
            return held[0] if held else None
        called, first = self.source.find(self.module, node.func), None
        if called is None and isinstance(node.func, ast.Attribute):
            first = self.held(node.func.value)  # a method of what holds the config
            if isinstance(first, tuple):
                called = first[0], f"{first[1]}.{name}"
        if called in self.source.classes:
            return self.construct(called, [*held, *by_name.values()])
        if called not in self.source.functions:
            return None
        positional, _ = self.source.parameters(called)
        held = held if first is None else [first, *held]
        names = dict(zip([a.arg for a in positional], held, strict=False)) | by_name
        result = self.enter(called, {n: h for n, h in names.items() if n and h})
        returns = self.source.functions[called].returns
        return result or self.source.annotated(called[0], returns)

    def construct(self, cls, held):
        """Enter a class; what it makes holds a config if its fields say so."""
        kinds = {str(kind) for kind in held if kind}
        if not kinds or cls[1].endswith("Error"):
            return None
        self.walk.stays.setdefault(cls, set()).update(kinds)
        self.walk.steps.setdefault((self.place, cls), self.rooms)
        return cls if self.source.fields(cls) else None

    def enter(self, place, names):
        if not names:
            return None
        self.walk.steps.setdefault((self.place, place), self.rooms)
        return self.walk.visit(place, names, self.rooms)

    def hand_over(self, node):
        """Enter a function that is handed over, for what its annotations say."""
        place = self.source.find(self.module, node)
        if place in self.source.functions:
            _, parameters = self.source.parameters(place)
            held = {
                p.arg: self.source.annotated(place[0], p.annotation) for p in parameters
            }
            self.enter(place, {name: kind for name, kind in held.items() if kind})
