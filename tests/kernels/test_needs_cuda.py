"""A run in which no GPU test ran must not look like one in which all passed."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from marks import slow

SUITE = Path(__file__).parent / "test_graph.py"


def outcomes(required: str | None) -> dict[str, int]:
    """{"skipped": 3, ...} of the graph tests that need a GPU, run where none is to be seen."""
    environment = {k: v for k, v in os.environ.items() if k != "DLMS_REQUIRE_CUDA"}
    environment |= {"CUDA_VISIBLE_DEVICES": "", "PYTHONWARNINGS": "ignore"}
    environment |= {} if required is None else {"DLMS_REQUIRE_CUDA": required}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(SUITE)]
    command += ["-m", "needs_cuda", "-W", "ignore"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert "torch sees no CUDA device" in done.stdout, done.stdout + done.stderr
    last = done.stdout.strip().splitlines()[-1]
    return {kind.rstrip("s"): int(count) for count, kind in re.findall(r"(\d+) ([a-z]+)", last)}


@pytest.mark.parametrize("required", [None, slow("0")])
def test_skipped_with_a_reason_where_none_is_asked_for(required):
    found = outcomes(required)
    assert found["skipped"] >= 4 and not {"failed", "error", "passed"} & set(found)


def test_failed_where_one_is_asked_for():
    found = outcomes("1")
    assert "skipped" not in found and "passed" not in found
    assert found.get("failed", 0) + found.get("error", 0) >= 4
