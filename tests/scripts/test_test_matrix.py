"""The matrix covers every Python and torch; a missing interpreter is a failure."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture
def matrix(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    import sys

    spec = importlib.util.spec_from_file_location("test_matrix", ROOT / "scripts/test_matrix.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "test_matrix", module)  # dataclasses look it up
    spec.loader.exec_module(module)
    return module


def test_every_version_is_in_the_matrix(matrix: ModuleType) -> None:
    runs = matrix.chosen(None, None)
    assert {run.python for run in runs} == set(matrix.PYTHONS)
    assert {run.torch for run in runs} == set(matrix.TORCHES)
    workflow = (ROOT / ".github/workflows/ci.yml").read_text()
    assert all(f'"{python}"' in workflow for python in matrix.PYTHONS)
    assert [r.torch for r in matrix.chosen(["3.13"], ["newest"])] == ["newest"]


def test_the_plan_runs_the_slow_tests_too(
    matrix: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    assert matrix.main(["--plan"]) == 0
    said = capsys.readouterr().out
    assert said.count("slow or not slow") == len(matrix.PAIRS)


def test_a_missing_interpreter_fails(
    matrix: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(matrix.shutil, "which", lambda _name: None)
    assert matrix.main(["--python", "3.13", "--torch", "2.13"]) == 1
    assert "no python3.13 on the PATH" in capsys.readouterr().out
