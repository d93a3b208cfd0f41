"""Cases that ``make test`` leaves to ``make test-all``: slow, and not the only one of their kind."""

from __future__ import annotations

from typing import Any

import pytest


def slow(*values: Any) -> Any:
    """A case of ``parametrize`` under the mark of slow tests."""
    return pytest.param(*values, marks=pytest.mark.slow)
