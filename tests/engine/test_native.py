"""A compiled module of other sources is not used, and it is said what to do."""

from __future__ import annotations

import logging
from types import SimpleNamespace

import pytest

from dlms_engine.engine import native


def test_a_build_of_older_sources_is_refused_by_name(caplog: pytest.LogCaptureFixture) -> None:
    whole = SimpleNamespace(**dict.fromkeys(native.NEEDED))
    assert native.usable(whole) == (whole, "")
    stale = SimpleNamespace(**{n: None for n in native.NEEDED if n != "DriverError"})
    with caplog.at_level(logging.WARNING, "dlms_engine"):
        module, problem = native.usable(stale)
    assert module is None
    assert "DriverError" in problem and "rebuild" in problem
    assert [record.levelno for record in caplog.records] == [logging.WARNING]


def test_every_name_that_the_package_uses_is_looked_for() -> None:
    """``native.NAME`` anywhere in the package is among those that are checked."""
    import re
    from pathlib import Path

    import dlms_engine

    package = Path(dlms_engine.__file__).parent
    used: set[str] = set()
    for path in (package / "engine").glob("*.py"):
        if path.name != "native.py":
            used |= set(re.findall(r"\b_?native\.([A-Za-z_]\w*)", path.read_text(encoding="utf-8")))
    assert used and used - {"native", "problem"} <= set(native.NEEDED)
