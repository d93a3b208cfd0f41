"""A run in which no GPU test ran must not look like one in which all passed."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

SUITE = Path(__file__).parent / "test_graph.py"


ASKED = (None, "0", "1")
"""Values of DLMS_REQUIRE_CUDA; None is not set."""
PROGRAM = """
import os, sys, pytest
for required in (None, "0", "1"):
    os.environ.pop("DLMS_REQUIRE_CUDA", None)
    if required is not None:
        os.environ["DLMS_REQUIRE_CUDA"] = required
    print("=== required", flush=True)
    pytest.main(["-q", "-p", "no:cacheprovider", sys.argv[1], "-m", "needs_cuda", "-W", "ignore"])
"""


@pytest.fixture(scope="module")
def outcomes() -> dict[str | None, dict[str, int]]:
    """{"skipped": 3, ...} of the graph tests that need a GPU, run where none is to be seen."""
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "PYTHONWARNINGS": "ignore"}
    command = [sys.executable, "-c", PROGRAM, str(SUITE)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    found = {}
    runs = done.stdout.split("=== required\n")[1:]
    for required, said in zip(ASKED, runs, strict=True):
        assert "torch sees no CUDA device" in said, done.stdout + done.stderr
        last = re.findall(r"(\d+) ([a-z]+)", said.strip().splitlines()[-1])
        found[required] = {kind.rstrip("s"): int(count) for count, kind in last}
    return found


@pytest.mark.parametrize("required", [None, "0"])
def test_skipped_with_a_reason_where_none_is_asked_for(outcomes, required):
    found = outcomes[required]
    assert found["skipped"] >= 4 and not {"failed", "error", "passed"} & set(found)


def test_failed_where_one_is_asked_for(outcomes):
    found = outcomes["1"]
    assert "skipped" not in found and "passed" not in found
    assert found.get("failed", 0) + found.get("error", 0) >= 4
