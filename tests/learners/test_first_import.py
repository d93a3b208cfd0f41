"""Any learner may be the first that a process imports."""

from __future__ import annotations

import subprocess
import sys

import pytest

from dlms_engine.learners import METHODS


@pytest.mark.parametrize("method", sorted(METHODS))
def test_a_learner_is_imported_first(method):
    command = [sys.executable, "-W", "ignore", "-c", f"import {METHODS[method]}"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
