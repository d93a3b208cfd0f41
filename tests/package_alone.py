"""Runs an exported package in a process that does not have this library."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

PROGRAM = """
import json, sys, torch
folder = sys.argv[1]
run = torch._inductor.aoti_load_package(folder + "/sampler.pt2")
given = torch.load(folder + "/given.pt", weights_only=True)
outputs = [run(*arguments) for arguments in given]
assert not [name for name in sys.modules if name.startswith("dlms")], "the library was imported"
assert not hasattr(torch.ops.dlms, "fused_row"), "its operators were loaded"
torch.save(outputs, folder + "/outputs.pt")
print(json.dumps(run.get_metadata()))
"""


def run_alone(folder: Path, given: list[tuple[Any, ...]]) -> tuple[list[Tensor], dict[str, str]]:
    """(outputs, metadata) of ``folder/sampler.pt2`` on each tuple of arguments."""
    torch.save(given, folder / "given.pt")
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(folder)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    outputs = torch.load(folder / "outputs.pt", weights_only=True)
    return outputs, json.loads(done.stdout.splitlines()[-1])
