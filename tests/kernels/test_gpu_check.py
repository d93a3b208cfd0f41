"""scripts/gpu_check.sh says what is missing before it does anything."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from dlms_engine.lab.bench import __main__ as bench
from dlms_engine.lab.bench import device, loop

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


@pytest.mark.parametrize("package", ["torch", "triton", "dlms_engine"])
def test_a_vendored_torch_is_refused(tmp_path, monkeypatch, package):
    (tmp_path / "vendor" / package).mkdir(parents=True)
    monkeypatch.setenv("VENDOR", str(tmp_path / "vendor"))
    done = run(tmp_path)
    assert done.returncode == 2 and f"vendor holds {package}" in done.stdout


STUB = """#!/bin/bash
printf '%s' "PYTHONPATH=$PYTHONPATH|COMMIT=$DLMS_COMMIT" >>"$CALLS"
printf '|%s' "$@" >>"$CALLS"
echo >>"$CALLS"
[[ $1 == - ]] && echo '{}'
[[ "$*" == *"bench $FAILS"* ]] && exit 3
exit 0
"""


def pretend(tmp_path, monkeypatch, vendor, fails="nothing"):
    """The script's phase 'bench' in a folder of its own, on a Python that only notes its calls."""
    for name in ("scripts", "build/gpu_site", "cuda/bin", *(["vendor"] if vendor else [])):
        (tmp_path / name).mkdir(parents=True)
    shutil.copy(SCRIPT, tmp_path / "scripts")
    for stub in (tmp_path / "python", tmp_path / "cuda/bin/nvcc"):
        stub.write_text(STUB)
        stub.chmod(0o755)
    monkeypatch.delenv("VENV", raising=False)
    given = {"PYTHON": "python", "CUDA_HOME": "cuda", "OUT": "out", "CALLS": "calls"}
    for key, value in given.items():
        monkeypatch.setenv(key, str(tmp_path / value))
    monkeypatch.setenv("DLMS_COMMIT", "1234567")
    monkeypatch.setenv("FAILS", fails)
    command = ["bash", str(tmp_path / "scripts" / "gpu_check.sh"), "bench"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    calls = [line.split("|") for line in (tmp_path / "calls").read_text().splitlines()]
    return done, [c for c in calls if "dlms_engine.lab.bench" in c]


@pytest.mark.parametrize("vendor", [True, False])
def test_every_benchmark_is_called(tmp_path, monkeypatch, vendor):
    done, calls = pretend(tmp_path, monkeypatch, vendor)
    assert done.returncode == 0, done.stdout + done.stderr
    assert [call[4] for call in calls] == ["step", "loop", "device"]
    monkeypatch.setattr(device, "no_gpu", lambda program: True)
    monkeypatch.setattr(loop, "no_gpu", lambda program: True)
    for call in calls:
        found = call[0].removeprefix("PYTHONPATH=").split(":")
        assert found[0] == str(tmp_path / "build/gpu_site")
        assert (str(tmp_path / "vendor") in found) is vendor
        assert call[1] == "COMMIT=1234567"
        assert bench.main(call[4:]) == 2  # its options are understood; argparse would exit
        assert str(tmp_path / "out") in call[-1]
    report = json.loads((tmp_path / "out" / "gpu_check.json").read_text())
    phases = {p["phase"]: p["status"] for p in report["phases"]}
    assert phases == dict.fromkeys(("backends", "bench-step", "bench-loop", "bench-row"), "passed")


def test_a_failing_benchmark_fails_the_check_but_not_the_others(tmp_path, monkeypatch):
    done, calls = pretend(tmp_path, monkeypatch, vendor=False, fails="step")
    assert done.returncode == 1 and len(calls) == 3
    report = json.loads((tmp_path / "out" / "gpu_check.json").read_text())
    phases = {p["phase"]: p["status"] for p in report["phases"]}
    assert phases["bench-step"] == "failed (3)" and phases["bench-row"] == "passed"
