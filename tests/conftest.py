"""Shared set-up: one thread, this folder on the path so that tests can import ``analytic``, the
Triton interpreter where there is no GPU, and what ``needs_cuda`` means.
"""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Iterator
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

from dlms_engine import learners  # noqa: E402
from dlms_engine.learners.start import ExactSolution  # noqa: E402
from dlms_engine.learners.training import validation  # noqa: E402

BEGUN = learners.begun


@pytest.fixture(autouse=True)
def _needs_cuda(request: pytest.FixtureRequest) -> None:
    if request.node.get_closest_marker("needs_cuda"):
        from gpu import require_cuda

        require_cuda()


@pytest.fixture(autouse=True, scope="session")
def _quick_learners() -> Iterator[None]:
    """Learners begin where their settings say, and what they take for exact is proved at a quarter of
    the steps: the search for a start and the proof have tests of their own.
    """
    brief = functools.partial(ExactSolution, first_steps=6)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(learners, "begun", lambda begin, problem, nfe, given, **_: dict(given))
        patch.setattr(validation, "ExactSolution", brief)
        yield


@pytest.fixture(autouse=True)
def _measured_start(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.node.get_closest_marker("measured_start") is not None:
        monkeypatch.setattr(learners, "begun", BEGUN)
        monkeypatch.setattr(validation, "ExactSolution", ExactSolution)
