"""Any learner may be the first that a process imports."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from dlms_engine.learners import LEARNERS

PROGRAM = """
import importlib, os, sys
import torch  # once: what is imported after the fork is the package

failed = []
for module in sys.argv[1:]:
    child = os.fork()
    if not child:
        importlib.import_module(module)
        os._exit(0)
    if os.waitpid(child, 0)[1]:
        failed.append(module)
print("failed:", failed)
"""


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_every_learner_is_imported_first():
    command = [
        sys.executable,
        "-W",
        "ignore",
        "-c",
        PROGRAM,
        *(f"dlms_engine.learners.{name}" for name in LEARNERS),
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "failed: []", done.stdout + done.stderr
