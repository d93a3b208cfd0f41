"""The house stays in order; every rule has a planted fault that breaks it."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import layout
import pytest

import dlms_engine

PACKAGE = Path(dlms_engine.__file__).parent
ORDER = (
    "support", "ops", "processes", "models", "solvers", "policies", "engine",
    "checkpoints", "learners", "integrations", "lab", "cli",
)  # fmt: skip
"""Every part may import those before it; ``lab`` is imported by the command line alone."""

BY_STRING = {
    "dlms_engine": "public names on first use, all of them imported for type checkers too",
    "dlms_engine.cli.own_model": "the user's own module:function",
    "dlms_engine.lab.any_model": "the same",
}

KERNELS = {"fused_row", "fused_row_", "fused_row_backward"}
"""An operator and its reference have one name: ``ops`` and ``ops.reference``."""


def test_imports_point_down() -> None:
    assert layout.climbs(PACKAGE, ORDER) == []


def test_no_modules_import_each_other() -> None:
    assert layout.circles(PACKAGE) == []


def test_no_import_is_hidden_in_a_string() -> None:
    assert set(layout.string_imports(PACKAGE)) <= set(BY_STRING)


def test_files_are_written_by_one_writer() -> None:
    """Under a partial name that ``support.files.replacing`` gave, or by its writers."""
    assert layout.own_writers(PACKAGE) == []


def test_names_imported_on_first_use_are_known_to_type_checkers() -> None:
    tree = ast.parse((PACKAGE / "__init__.py").read_text(encoding="utf-8"))
    seen = {
        alias.name
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and node.level
        for alias in node.names
    }
    assert seen == set(dlms_engine.__all__)


def test_the_top_level_is_the_list_of_parts() -> None:
    assert layout.entries(PACKAGE) == sorted(ORDER)
    assert len(ORDER) <= 12


def test_the_map_names_the_parts_in_their_order() -> None:
    text = (Path(__file__).parent.parent / "docs" / "architecture.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `(\w+)(?:/|\.py)` \|", text, flags=re.MULTILINE)
    assert sorted(rows) == sorted(ORDER)
    assert layout.climbs(PACKAGE, tuple(reversed(rows))) == []


def test_a_public_name_is_defined_once() -> None:
    names = layout.public_names(PACKAGE)
    twice = {name: homes for name, homes in names.items() if len(homes) > 1}
    assert {k: v for k, v in twice.items() if k not in KERNELS} == {}


# -- planted faults ------------------------------------------------------------------------------

Plant = dict[str, str]


def planted(folder: Path, files: Plant) -> Path:
    package = folder / "house"
    for name, text in {"__init__.py": "", "low/__init__.py": "", "high/__init__.py": ""}.items():
        files.setdefault(name, text)
    for name, text in files.items():
        path = package / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return package


@pytest.mark.parametrize(
    "text",
    [
        "from house.high import roof",
        "from ..high.roof import tile",
        "from .. import high",
        "def lazily():\n    from ..high import roof",
        "import house.high.roof",
    ],
)
def test_a_climbing_import_is_seen(text: str, tmp_path: Path) -> None:
    package = planted(tmp_path, {"low/cellar.py": text, "high/roof.py": "tile = 1"})
    assert len(layout.climbs(package, ("low", "high"))) == 1
    assert layout.climbs(package, ("high", "low")) == []


@pytest.mark.parametrize(
    ("files", "size"),
    [
        ({"low/a.py": "from . import b", "low/b.py": "from .a import x"}, 2),
        (
            {
                "low/a.py": "def f():\n    from .b import x",
                "low/b.py": "from .c import x",
                "low/c.py": "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from .a import f",
            },
            3,
        ),
    ],
)
def test_a_circle_is_seen(files: Plant, size: int, tmp_path: Path) -> None:
    assert [len(circle) for circle in layout.circles(planted(tmp_path, files))] == [size]


@pytest.mark.parametrize(
    "call", ["importlib.import_module('house.high')", "__import__('house.high')"]
)
def test_an_import_by_string_is_seen(call: str, tmp_path: Path) -> None:
    package = planted(tmp_path, {"low/cellar.py": f"import importlib\n{call}"})
    assert layout.string_imports(package) == ["house.low.cellar"]


def test_a_name_defined_twice_is_seen(tmp_path: Path) -> None:
    files = {
        "low/a.py": "def beam(): ...",
        "high/b.py": "beam: int = 1\n_own = 2",
        "low/c.py": "_own = 1",
    }
    names = layout.public_names(planted(tmp_path, files))
    assert sorted(names["beam"]) == ["house.high.b", "house.low.a"]
    assert "_own" not in names


@pytest.mark.parametrize(
    "text",
    [
        "path.write_text('x')",
        "(folder / 'x').write_bytes(raw)",
        "save_file(tensors, path)",
        "open(path, 'w').write('x')",
        "torch.save(tensors, path)",
        "figure.savefig(path)",
    ],
)
def test_a_writer_of_its_own_is_seen(text: str, tmp_path: Path) -> None:
    package = planted(tmp_path, {"low/a.py": text, "high/b.py": "partial.write_text('x')"})
    assert layout.own_writers(package) == ["low/a.py:1"]


def test_a_loose_module_is_seen(tmp_path: Path) -> None:
    package = planted(tmp_path, {"loose.py": "", "_hidden.py": ""})
    assert layout.entries(package) == ["high", "loose", "low"]


def test_the_checks_see_this_package() -> None:
    """A check that finds nothing anywhere would pass everything."""
    found = layout.imports(PACKAGE)
    assert len(found) > 400 and len(layout.modules(PACKAGE)) > 100
    assert layout.climbs(PACKAGE, tuple(reversed(ORDER)))
