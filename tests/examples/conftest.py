"""The programs of ``examples/`` as modules."""

from __future__ import annotations

import importlib
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


@pytest.fixture
def example(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], Any]]:
    """name -> the program, imported; signal handlers that it installs are undone."""
    monkeypatch.syspath_prepend(str(EXAMPLES))
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield importlib.import_module
    for number, handler in before.items():
        signal.signal(number, handler)
