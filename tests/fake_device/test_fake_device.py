"""Runs the tests on the stand-in device in a process of their own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from marks import slow

FOLDER = Path(__file__).parent


QUICK = "sample or updates-dlms or scheduler or noise or inference or autocast or by_dtype"


@pytest.mark.parametrize(
    ("files", "only"),
    [
        (("test_paths.py", "test_calls.py"), QUICK),
        slow(("test_paths.py",), "test"),
        slow(("test_calls.py", "test_export.py"), "test"),
        slow(("test_planted.py",), "test"),
    ],
)
def test_on_the_stand_in_device(files: tuple[str, ...], only: str) -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", only]
    command += [str(FOLDER / name) for name in files]
    environment = {**os.environ, "DLMS_FAKE_DEVICE": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{done.stdout[-8000:]}\n{done.stderr[-2000:]}"
