"""``dlms doctor`` says what is there, what is not, and what to do."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from commands import answer, run

from dlms_engine.cli import doctor
from dlms_engine.engine import cpu_loop, native
from dlms_engine.ops import backends


def test_it_reports_this_installation(capsys: pytest.CaptureFixture[str]) -> None:
    if native.native is None:
        pytest.skip("this installation has no compiled parts")
    facts: dict[str, Any] = answer(capsys, "doctor")
    assert facts["torch"] == torch.__version__
    assert facts["cpu_isa"] == cpu_loop.cpu_isa()
    assert facts["backends"]["cpu"] == list(backends.available("cpu"))
    assert facts["compiled"]["_C"]["found"]
    assert run("doctor") == 0
    assert torch.__version__ in capsys.readouterr().out


def test_a_missing_part_is_named_with_what_to_do(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(native, "native", None)
    monkeypatch.setattr(native, "problem", "it is not there")
    assert run("doctor") == 1
    said = capsys.readouterr().out
    assert "MISSING" in said and "_C (the sampling loop" in said
    assert "it is not there" in said and "pip install" in said


def test_an_extra_that_is_not_installed_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    lines = ["torch>=2.11", "no_such_package>=1; extra == 'plots'", 'ruff; extra == "lint"']
    monkeypatch.setattr(doctor.importlib.metadata, "requires", lambda _name: lines)
    facts = doctor.installation()
    assert facts["extras"] == {"plots": ["no_such_package"]}
    assert any("dlms-engine[plots]" in line for line in facts["advice"])
