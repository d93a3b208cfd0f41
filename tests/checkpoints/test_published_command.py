"""Learned solvers of others on the command line and on the page."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))

from commands import answer, complaint, run
from published_cases import (
    dyweight_weights,
    ld3_times,
)
from published_files import (
    dyweight_file,
    ld3_file,
    sampler_modules,
    write,
)
from test_edm import Call, writers  # noqa: F401

from dlms_engine.checkpoints.published import FORMATS
from dlms_engine.models.denoiser import Denoiser
from dlms_engine.policies.distilled import load_solver
from dlms_engine.processes import EDM


@pytest.fixture(autouse=True)
def modules(writers: None, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    sampler_modules(monkeypatch)


def test_the_command_converts_and_says_what_the_file_says(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = dyweight_file(tmp_path / "s.pkl", dyweight_weights(3), torch.ones(3))
    out = tmp_path / "three.safetensors"
    assert run("convert", source, out) == 0
    text = capsys.readouterr().out
    assert "a solver of DyWeight, 3 evaluations" in text and "dataset_name: cifar10" in text
    assert load_solver(out).method == "dyweight"
    assert "give --overwrite" in complaint(capsys, "convert", source, out)
    other = tmp_path / "three.pt"
    assert "must end in .safetensors" in complaint(capsys, "convert", source, other)


MODEL = """
from torch import nn
from dlms_engine import Denoiser, processes

class Zero(nn.Module):
    def forward(self, x, t):
        return 0 * x

def model():
    return Denoiser(Zero(), processes.EDM(), "data"), (2,)
"""


def test_the_command_takes_settings_and_a_model(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "zero_model.py").write_text(MODEL)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    source, out = ld3_file(tmp_path / "b.pt", *ld3_times(5)), tmp_path / "s.safetensors"
    assert "--set solver=" in complaint(capsys, "convert", source, out)
    options = ("--set", "solver=ipndm", "--set", "order=2", "--model", "zero_model:model")
    told = answer(capsys, "convert", source, out, *options)
    assert (told["format"], told["nfe"]) == ("LD3", 4)
    samples = ("--seeds", "0-1", "--output", tmp_path / "x.safetensors")
    assert run("sample", "--solver", out, "--model", "zero_model:model", *samples) == 0
    network = write(tmp_path / "n.pkl", {"ema": 1})
    other = ("convert", network, tmp_path / "n.safetensors", "--model", "zero_model:model")
    assert "--model is for learned solvers" in complaint(capsys, *other)


def test_the_example_of_the_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    dyweight_file(tmp_path / "network-snapshot-000010.pkl", dyweight_weights(5), None, afs=False)
    page = Path(__file__).parents[2] / "docs" / "integrations" / "published.md"
    (block,) = re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), flags=re.S)
    names: dict[str, Any] = {
        "denoiser": Denoiser(lambda x, sigma: 0.1 * x, EDM(), "data"),
        "shape": (3, 4, 4),
    }
    exec(compile(block, page.name, "exec"), names)
    assert names["images"].shape == (4, 3, 4, 4)
    assert load_solver(tmp_path / "five.safetensors").method == "dyweight"


def test_formats_are_in_the_docs() -> None:
    text = (Path(__file__).parents[2] / "docs/integrations/published.md").read_text("utf-8")
    assert all(f"| {name}" in text for name in FORMATS)
