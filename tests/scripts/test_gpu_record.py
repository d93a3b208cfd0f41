"""scripts/gpu_record.sh: what is missing is told at once, and its stages fit together."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "scripts" / "gpu_record.sh"
pytestmark = pytest.mark.skipif(shutil.which("bash") is None, reason="bash is not installed")
for module in ("torchmetrics", "scipy", "matplotlib", "PIL"):
    pytest.importorskip(module)


def run(work: Path, *words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    held = {k: v for k, v in os.environ.items() if k not in ("VENV", "DATA", "DLMS_MODELS")}
    held |= {"WORK": str(work), "MODELS": str(work / "models"), "PYTHON": sys.executable}
    command = ["bash", str(SCRIPT), *words]
    return subprocess.run(
        command, capture_output=True, text=True, check=False, env=held | environment
    )


def test_what_is_missing_is_told(tmp_path: Path) -> None:
    assert subprocess.run(["bash", "-n", str(SCRIPT)], check=False).returncode == 0
    done = run(tmp_path, "speeed")
    assert done.returncode == 2 and "no stage 'speeed'" in done.stderr
    done = run(tmp_path, "train", PYTHON="no-such-python")
    assert done.returncode == 2 and "no 'no-such-python'" in done.stderr
    done = run(tmp_path)
    assert done.returncode == 2 and "no stage is named" in done.stderr


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU: it would run")
def test_without_a_gpu_the_rehearsal_is_named(tmp_path: Path) -> None:
    done = run(tmp_path, "train")
    assert done.returncode == 2 and "--rehearse" in done.stderr


def test_what_lacks_is_named_and_time_is_kept(tmp_path: Path) -> None:
    done = run(tmp_path, "--rehearse", "export")
    assert done.returncode == 2 and "run the stage train first" in done.stderr
    done = run(tmp_path, "--rehearse", "compare", "3")
    assert done.returncode == 2 and "run the stage export first" in done.stderr
    done = run(tmp_path, "--rehearse", "train", BUDGET="3")
    assert done.returncode == 75 and "call it again" in done.stdout


@pytest.mark.slow
def test_the_whole_rehearsal(tmp_path: Path) -> None:
    done = run(tmp_path, "--rehearse", BUDGET="3000")
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    found = json.loads((tmp_path / "compare" / "compare.json").read_text())
    assert {"dlms", "gits"} <= {row["solver"] for row in found["rows"] if "rmse" in row}
    labels = [row["solver"] for row in _rows(tmp_path / "ablation") if row["learned"]]
    assert len(labels) == 7
    assert len([row for row in _rows(tmp_path / "interpolation") if row["learned"]]) == 4
    record = json.loads((tmp_path / "record" / "record.json").read_text())
    assert any(row["learned"] for row in record["rows"])
    assert json.loads((tmp_path / "speed.json").read_text())["settings"]["model"] == "cifar10-32"
    other = tmp_path / "elsewhere"
    done = run(other, "--rehearse", "unpack", PACK=str(tmp_path / "pack"))
    assert done.returncode == 0, done.stderr
    for kept in ("compare/compare.json", "compare/cache", "models/cifar10-32/provenance.json"):
        assert (other / kept).exists()
    shutil.rmtree(tmp_path / "models")
    again = run(other, "--rehearse", "compare")  # everything is found, nothing measured again
    assert again.returncode == 0, again.stderr
    rows = (other / "compare" / "compare.json").read_text()
    assert rows == (tmp_path / "compare" / "compare.json").read_text()


def _rows(folder: Path) -> list[dict[str, object]]:
    rows: list[dict[str, object]] = json.loads((folder / "compare.json").read_text())["rows"]
    return rows
