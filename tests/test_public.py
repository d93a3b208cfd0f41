"""The public surface: promised names, a light import, pages that name what exists."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

import dlms_engine

ROOT = Path(__file__).parent.parent
PROMISED = (
    "Denoiser",
    "Sampler",
    "SolverTable",
    "distill",
    "embedded",
    "grids",
    "load_solver",
    "processes",
    "save",
    "solvers",
)


@pytest.mark.parametrize("name", sorted({*PROMISED, *dlms_engine.__all__}))
def test_name_is_there(name: str) -> None:
    assert getattr(dlms_engine, name) is not None
    assert name in dir(dlms_engine) and name in dlms_engine.__all__


def test_unknown_name_is_refused_with_the_known_ones() -> None:
    with pytest.raises(AttributeError, match=r"no attribute 'Sampelr'.*Sampler"):
        _ = dlms_engine.Sampelr


def _loaded(code: str) -> set[str]:
    """Top-level packages a fresh interpreter has after ``code``."""
    command = f"import sys; {code}; print(' '.join(m.partition('.')[0] for m in sys.modules))"
    done = subprocess.run(
        [sys.executable, "-c", command], capture_output=True, text=True, check=True
    )
    return set(done.stdout.split())


def test_import_is_light() -> None:
    heavy = {"torch", "numpy", "typer", "matplotlib", "diffusers", "torchmetrics"}
    assert not _loaded("import dlms_engine") & heavy
    # planted: the probe sees what a used name brings, and no extra comes with it
    assert _loaded("import dlms_engine; dlms_engine.Sampler") & heavy == {"torch", "numpy"}


@pytest.mark.parametrize(
    "page",
    [
        "CONTRIBUTING.md",
        "README.md",
        "docs/index.md",
        "docs/install.md",
        "docs/your_model.md",
        "docs/production.md",
        "docs/benchmarks.md",
    ],
)
def test_pages_name_only_files_that_exist(page: str) -> None:
    """Every file of the repository that a page names, in backticks or as a link, is there."""
    text = (ROOT / page).read_text(encoding="utf-8")
    quoted = re.findall(r"`([\w/.-]+(?:\.(?:py|md|h|cpp|txt|cff|sh)|/))`", text)
    linked = [link for link in re.findall(r"\]\(([^)]+)\)", text) if "://" not in link]
    bases = (ROOT, ROOT / "python/dlms_engine", (ROOT / page).parent)
    made = {"demo-out/", "site/", "mine.py"}  # written by the commands the pages describe
    missing = [
        name
        for name in {*quoted, *linked} - made
        if not any((base / name).exists() for base in bases)
    ]
    assert quoted or linked
    assert not missing
