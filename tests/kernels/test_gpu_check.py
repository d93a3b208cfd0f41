"""scripts/gpu_check.sh says what is missing before it does anything."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "gpu_check.sh"
pytestmark = pytest.mark.skipif(shutil.which("bash") is None, reason="bash is not installed")


def run(tmp_path: Path, *phases: str, python: str = sys.executable):
    environment = {k: v for k, v in os.environ.items() if k != "VENV"}
    environment |= {"OUT": str(tmp_path), "PYTHON": python}
    command = ["bash", str(SCRIPT), *phases]
    return subprocess.run(command, capture_output=True, text=True, check=False, env=environment)


def test_it_parses():
    assert subprocess.run(["bash", "-n", str(SCRIPT)], check=False).returncode == 0


def test_an_unknown_phase_is_refused(tmp_path):
    done = run(tmp_path, "build", "speed")
    assert done.returncode == 2 and "no phase 'speed'" in done.stdout
    assert "no phase 'speed'" in (tmp_path / "gpu_check.log").read_text()


def test_a_missing_python_is_told(tmp_path):
    done = run(tmp_path, python="no-such-python")
    assert done.returncode == 2 and "no 'no-such-python'" in done.stdout


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU: it would run")
def test_without_a_gpu_it_says_what_to_do(tmp_path):
    done = run(tmp_path)
    assert done.returncode == 2 and "what to do" in done.stdout, done.stdout + done.stderr
    assert not (tmp_path / "gpu_check.json").exists()
