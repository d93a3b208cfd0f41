"""Makes `dlms_engine.kernels` importable from a source tree that is not installed."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest

import dlms_engine
from dlms_engine.engine import cuda_graph_cache
from dlms_engine.engine.native import native

ROOT = Path(__file__).resolve().parents[2]

if importlib.util.find_spec("dlms_engine.kernels") is None:
    # Installed, kernels/ is a subpackage; here it lies at the root of the repository.
    spec = importlib.util.spec_from_file_location(
        "dlms_engine.kernels",
        ROOT / "kernels" / "__init__.py",
        submodule_search_locations=[str(ROOT / "kernels")],
    )
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["dlms_engine.kernels"] = module
    spec.loader.exec_module(module)
    dlms_engine.kernels = module  # type: ignore[attr-defined]

sys.path.insert(0, str(Path(__file__).parent))  # kernel_cases


@pytest.fixture(params=["python", *(["native"] if native is not None else [])])
def graph_backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The compiled cache of captured runs, and its replacement in Python: what holds for both."""
    if request.param == "python":
        monkeypatch.setattr(cuda_graph_cache, "native", None)
    return str(request.param)
