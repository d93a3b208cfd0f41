"""The stand-in device is for good once it is there: its tests have a process of their own."""

from __future__ import annotations

import os
from typing import Any

import pytest

ALONE = os.environ.get("DLMS_FAKE_DEVICE") == "1"
collect_ignore = (
    ["test_fake_device.py"]
    if ALONE
    else [f"test_{name}.py" for name in ("calls", "export", "paths", "planted")]
)
if ALONE:
    from fake_device import standin

    standin.register()


@pytest.fixture(autouse=True)
def _addresses(monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in tensor has no address of its own."""
    try:
        from dlms_engine.integrations.scheduler import indices
    except ImportError:  # without diffusers nothing asks for one
        return
    shares = indices._shares_memory

    def inside(one: Any, other: Any) -> bool:
        return shares(getattr(one, "numbers", one), getattr(other, "numbers", other))

    monkeypatch.setattr(indices, "_shares_memory", inside)


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every eighth handcrafted solver, coarse exact solutions and few updates: what matters is where
    they run.
    """
    from dlms_engine import solvers
    from dlms_engine.lab.comparison import session
    from dlms_engine.learners.auto import every_row, feature_phase
    from dlms_engine.learners.start import ExactSolution, contest

    monkeypatch.setattr(every_row, "MOST_UPDATES", 8)
    monkeypatch.setattr(feature_phase, "UPDATES", 20)
    every = solvers.handcrafted
    for module in (solvers, contest, session):
        monkeypatch.setattr(module, "handcrafted", lambda *of, **kinds: every(*of, **kinds)[::8])
    monkeypatch.setitem(ExactSolution.__init__.__kwdefaults__, "most_steps", 24)
