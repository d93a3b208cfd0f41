"""Shared set-up: one thread, this folder on the path so that tests can import ``analytic``, the
Triton interpreter where there is no GPU, and what ``needs_cuda`` means.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))
torch.set_num_threads(1)
os.environ["HF_HUB_OFFLINE"] = "1"
if not torch.cuda.is_available():
    # Before anything imports Triton, which looks once: its kernels then run on CPU tensors.
    os.environ.setdefault("TRITON_INTERPRET", "1")

# After the settings above: it imports the package. Captured runs on a machine without a GPU.
from standin_driver import captured, driver, standin_library  # noqa: E402, F401


@pytest.fixture(autouse=True)
def _needs_cuda(request: pytest.FixtureRequest) -> None:
    if request.node.get_closest_marker("needs_cuda"):
        from gpu import require_cuda

        require_cuda()


@pytest.fixture(autouse=True)
def _published_start(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Learners begin where their settings say: the search before them has tests of its own."""
    if request.node.get_closest_marker("measured_start") is None:
        from dlms_engine import learners

        monkeypatch.setattr(learners, "begun", lambda begin, problem, nfe, given, **_: dict(given))
