"""The build asks for torch exactly where the environment lends no headers of a torch new enough."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

CMAKE = Path(__file__).parents[2] / "cmake"


def loaded(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, CMAKE / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def fake_torch(folder: Path, version: str) -> str:
    (folder / "torch" / "include").mkdir(parents=True)
    (folder / "torch" / "version.py").write_text(f"__version__ = '{version}'\n")
    return str(folder / "torch")


@pytest.mark.parametrize(
    ("versions", "chosen"),
    [((), None), (("2.13.0+cpu",), 0), (("2.9.1", "2.11.0"), 1), (("2.9.1",), 0)],
)
def test_the_first_torch_that_is_new_enough_is_taken(
    versions: tuple[str, ...],
    chosen: int | None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    find_torch = loaded("find_torch")
    paths = [fake_torch(tmp_path / str(k), version) for k, version in enumerate(versions)]
    (tmp_path / "no-headers" / "torch").mkdir(parents=True)
    broken = str(tmp_path / "no-headers" / "torch")
    monkeypatch.setattr(find_torch, "candidates", lambda: iter([broken, *paths]))
    assert find_torch.folder() == (None if chosen is None else paths[chosen])


def test_torch_is_a_build_requirement_only_where_there_is_none(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pytest.importorskip("scikit_build_core")
    backend = loaded("build_backend")
    for ask in (backend.get_requires_for_build_wheel, backend.get_requires_for_build_editable):
        monkeypatch.setattr(backend.find_torch, "folder", lambda: None)
        assert backend.TORCH in ask()
        assert backend.TORCH not in ask({"cmake.define.DLMS_TORCH_DIR": "/somewhere/torch"})
        monkeypatch.setattr(backend.find_torch, "folder", lambda: "/somewhere/torch")
        assert backend.TORCH not in ask()


def test_cmake_reads_one_path() -> None:
    done = subprocess.run(
        [sys.executable, str(CMAKE / "find_torch.py")], capture_output=True, text=True, check=True
    )
    assert done.stdout == "" or Path(done.stdout, "version.py").is_file()
