"""What tests/test_layout.py looks at: the imports and the public names of a package, by its syntax."""

from __future__ import annotations

import ast
from collections import defaultdict
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import NamedTuple


class Import(NamedTuple):
    """Module ``source`` imports module ``target``, wherever in its text."""

    source: str
    target: str
    line: int


def modules(package: Path) -> dict[str, Path]:
    """Dotted name -> file, of every module of ``package``."""
    found = {}
    for path in package.rglob("*.py"):
        parts = list(path.relative_to(package.parent).with_suffix("").parts)
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imports(package: Path) -> list[Import]:
    """Every import of a module of ``package`` by another: lazy ones and those for types too."""
    known = modules(package)
    found = []
    for name, path in known.items():
        home = name if path.name == "__init__.py" else name.rpartition(".")[0]
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                targets = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                base = home.split(".")[: len(home.split(".")) - max(node.level - 1, 0)]
                start = [*(base if node.level else []), *([node.module] if node.module else [])]
                source = ".".join(start)
                full = [f"{source}.{alias.name}" for alias in node.names]
                targets = [long if long in known else source for long in full]
            else:
                continue
            found += [Import(name, t, node.lineno) for t in targets if t in known and t != name]
    return found


def climbs(package: Path, order: Iterable[str]) -> list[str]:
    """Imports of a part of the package by a part that stands before it in ``order``."""
    rank = {part: number for number, part in enumerate(order)}
    found = []
    for source, target, line in imports(package):
        parts = [name.split(".")[1:2] for name in (source, target)]
        if not parts[0] or parts[0][0].startswith("_"):
            continue  # the package's face
        above = rank[parts[1][0]] if parts[1] and not parts[1][0].startswith("_") else -1
        if above > rank[parts[0][0]]:
            found.append(f"{source}:{line} imports {target}")
    return found


def circles(package: Path) -> list[list[str]]:
    """Groups of modules that import each other; the package's face is left out."""
    graph: dict[str, set[str]] = defaultdict(set)
    for source, target, _ in imports(package):
        if source != package.name:
            graph[source].add(target)
    reached = {name: _reached(graph, name) for name in list(graph)}
    groups = {
        tuple(sorted({n for n in reached[name] if name in reached.get(n, ())}))
        for name in graph
        if name in reached[name]
    }
    return [list(group) for group in sorted(groups)]


def _reached(graph: Mapping[str, set[str]], start: str) -> set[str]:
    seen: set[str] = set()
    stack = [start]
    while stack:
        for target in graph.get(stack.pop(), ()):
            if target not in seen:
                seen.add(target)
                stack.append(target)
    return seen


def string_imports(package: Path) -> list[str]:
    """Modules that import by a string, which a type checker does not see."""
    found = []
    for name, path in modules(package).items():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call):
                function = node.func
                called = getattr(function, "attr", getattr(function, "id", ""))
                if called in ("import_module", "__import__"):
                    found.append(name)
    return sorted(found)


def entries(package: Path) -> list[str]:
    """What a reader finds at the package's top level, private modules and markers left out."""
    names = {
        path.stem
        for path in package.iterdir()
        if path.suffix == ".py" or (path / "__init__.py").exists()
    }
    return sorted(name for name in names if not name.startswith("_"))


def public_names(package: Path) -> dict[str, list[str]]:
    """Public name -> the modules that define it at their top level."""
    found: dict[str, list[str]] = defaultdict(list)
    for module, path in modules(package).items():
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            for name in _defined(node):
                if not name.startswith("_") and module not in found[name]:
                    found[name].append(module)
    return found


def _defined(node: ast.stmt) -> list[str]:
    if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
        return [node.name]
    targets = node.targets if isinstance(node, ast.Assign) else []
    if isinstance(node, ast.AnnAssign):
        targets = [node.target]
    return [target.id for target in targets if isinstance(target, ast.Name)]


WRITERS = {"write_text", "write_bytes", "save_file", "savefig", "save"}
"""Calls that write a file, by their last name."""


def own_writers(package: Path) -> list[str]:
    """Where a file is written under its own name: calls of ``WRITERS`` that are given no ``partial``.

    ``write_text`` and ``write_bytes`` as functions are those of ``support.files``; ``save`` counts
    only for torch, NumPy and pictures, as solvers save themselves through ``support.files``.
    """
    found = []
    for path in sorted(package.rglob("*.py")):
        if path == package / "support" / "files.py":
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and _writes(node):
                found.append(f"{path.relative_to(package)}:{node.lineno}")
    return found


def _writes(call: ast.Call) -> bool:
    text = ast.unparse(call)
    if "partial" in text:
        return False
    if isinstance(call.func, ast.Name):
        writes = call.func.id == "open" and any(
            f"'{mode}'" in text for mode in ("w", "wb", "a", "x")
        )
        return writes or call.func.id == "save_file"
    if not isinstance(call.func, ast.Attribute) or call.func.attr not in WRITERS:
        return False
    owner = ast.unparse(call.func.value)
    return call.func.attr != "save" or owner in ("torch", "np", "numpy", "picture", "image")
