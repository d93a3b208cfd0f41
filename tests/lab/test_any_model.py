"""The models learners are tried on are made the same every time; the page says what was measured."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from dlms_engine.cli.model import load_model
from dlms_engine.lab import any_model, grounds


@pytest.mark.parametrize("name", ["flow-2d", "guided-8x8"])
def test_training_is_deterministic(name: str) -> None:
    ground = grounds.GROUNDS[name]
    one, two = (grounds.train_ground(ground, steps=3, batch=8).state_dict() for _ in range(2))
    assert all(torch.equal(one[key], two[key]) for key in one)
    other = grounds.train_ground(ground, steps=4, batch=8).state_dict()  # planted
    assert any(not torch.equal(one[key], other[key]) for key in one)


def test_every_ground_denoises_in_shape(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    quick = grounds.train_ground
    monkeypatch.setattr(grounds, "train_ground", lambda g: quick(g, steps=1, batch=4))
    for name in grounds.GROUNDS:
        for _ in range(2):  # trained, then read from the folder
            denoiser, shape, conditions = grounds.load_ground(name, tmp_path)
            cond = {k: v[:2] for k, v in conditions.items()}
            x = torch.randn(2, *shape)
            assert denoiser(x, 0.5, **cond).shape == x.shape
    with pytest.raises(ValueError, match="expected one of"):
        grounds.load_ground("flow-3d", tmp_path)


def test_two_grounds_are_models_of_the_command_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    quick = grounds.train_ground
    monkeypatch.setattr(grounds, "train_ground", lambda g: quick(g, steps=1, batch=4))
    monkeypatch.chdir(tmp_path)
    for name in ("flow_8x8", "vp_8x8"):
        model = load_model(f"dlms_engine.lab.grounds:{name}")
        assert model.shape == (1, 8, 8) and model.conditions is None
        kept = grounds.load_ground(name.replace("_", "-"), tmp_path / "models")[0]
        x = torch.randn(2, 1, 8, 8)
        assert torch.equal(model.denoiser(x, 0.5), kept(x, 0.5))
        other = grounds.load_ground("v-8x8", tmp_path)[0]  # planted: another model
        assert not torch.equal(model.denoiser(x, 0.5), other(x, 0.5))


def test_a_file_that_cannot_be_written_is_found_before_the_first_cell(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[object] = []
    monkeypatch.setattr(any_model, "cell", lambda *arguments: made.append(arguments))
    words = ["--folder", str(tmp_path), "--models", "flow-2d", "--nfe", "3", "--output"]
    with pytest.raises(OSError, match="create the folder"):
        any_model._main([*words, str(tmp_path / "absent" / "cells.json")])
    assert not made
    any_model._main([*words, str(tmp_path / "cells.json")])  # planted: there it is made
    assert len(made) == 1


def test_a_kept_cell_is_said_with_its_budget(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def cell(name: str, nfe: int, budget: str, *_: object) -> dict[str, object]:
        return {"model": name, "nfe": nfe, "budget": budget}

    monkeypatch.setattr(any_model, "cell", cell)
    words = ["--folder", str(tmp_path), "--output", str(tmp_path / "cells.json"), "--models"]
    any_model._main([*words, "flow-2d", "--nfe", "3", "--budget", "1k"])
    capsys.readouterr()
    any_model._main([*words, "vp-8x8,flow-2d", "--nfe", "3", "--budget", "2k"])
    assert capsys.readouterr().out.splitlines() == [
        "== vp-8x8, 3 evaluations",
        "== flow-2d, 3 evaluations: kept, of budget 1k",
    ]
    command = any_model._command(json.loads((tmp_path / "cells.json").read_text()), "2k")
    assert "--models flow-2d,vp-8x8 --nfe 3 --budget 2k" in command


def test_page_shows_ratio_and_interval() -> None:
    cell = {
        "model": "flow-2d", "nfe": 5, "base": "ddim/uniform", "chosen": "table", "base_rmse": 0.2,
        "auto_rmse": 0.1, "ratio": 2.0, "interval": [1.9, 2.1], "calls": 1000, "seconds": 3.0,
        "budget": "1k", "base_frechet": 0.5, "auto_frechet": 0.25,
    }  # fmt: skip
    text = any_model.models_page([cell], "the command")
    assert "**2.00** (1.90 to 2.10)" in text and "the command" in text and "ddim/uniform" in text
