"""The table of the papers' learners off EDM: its networks, a cell, its page."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from dlms_engine.lab import papers_table
from dlms_engine.lab.mixture import MIXTURE_SHAPE, MIXTURES, mixture_model
from dlms_engine.lab.papers_table import MeasuredMixture, PaperEntry, paper_cell, papers_page
from dlms_engine.learners import LEARNERS


@pytest.mark.parametrize("name", MIXTURES)
def test_the_networks_are_one_model(name: str) -> None:
    """At one noise level sigma / alpha every process's network has the posterior mean of EDM's."""
    edm, process = mixture_model(MIXTURES["EDM"]), MIXTURES[name]
    level = torch.tensor(1.5, dtype=torch.float64)
    t = process.inverse_sigma(level)
    x = torch.randn(4, *MIXTURE_SHAPE, dtype=torch.float64)
    model = mixture_model(process)
    torch.testing.assert_close(model(process.alpha(t) * x, t), edm(x, level))
    assert model.last_features.shape == (4, 64)


@pytest.mark.slow
def test_a_cell_has_its_base_on_fresh_samples() -> None:
    quick: dict[str, Any] = {"method": "dode", "solver": "ddim", "trajectories": 64}
    ground = MeasuredMixture("EDM", 64)
    entry = PaperEntry("D-ODE", quick, {"keep": "learned"})
    found = paper_cell(entry, ground, 5)
    assert found["learned"] == found["published"] < found["base"] and not found["behind"]
    assert found["compared"]["kept"] == "learned"
    refused = PaperEntry("AMED", {"method": "amed", "solver": "amed", "order": 2}, {})
    assert "fixed order" in paper_cell(refused, ground, 4)["refused"]


def test_the_page_names_what_is_behind_its_base() -> None:
    cell = {"base": 0.2, "published": None, "learned": 0.1, "behind": False}
    names = [entry.name for entry in papers_table._ENTRIES]
    cells = {f"{names[0]}|EDM": cell, f"{names[1]}|VP": {"refused": "no"}}
    page = papers_page(cells, "command", 5)
    assert (
        "0.2000 -> - -> **0.1000**" in page and "Behind its base by more than chance: none." in page
    )
    assert f"{names[1]} on VP is refused: no." in page
    worse = papers_page({f"{names[0]}|EDM": {**cell, "behind": True}}, "command", 5)
    assert f"Behind its base by more than chance: {names[0]} on EDM." in worse


def test_a_file_of_another_count_is_refused_and_one_of_the_same_goes_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """``--nfe 3`` into a file of 5 evaluations made a page of 3 with the figures of 5."""
    output, page = tmp_path / "cells.json", tmp_path / "page.md"
    cells = {f"{entry.name}|EDM": {"refused": "no"} for entry in papers_table._ENTRIES}
    output.write_text(json.dumps(cells))
    arguments = ["--output", str(output), "--page", str(page), "--grounds", "EDM"]
    with pytest.raises(SystemExit):
        papers_table._main([*arguments, "--nfe", "3"])
    assert "holds cells of 5 evaluations, --nfe is 3" in capsys.readouterr().err
    assert not page.exists()
    papers_table._main(arguments)
    assert "at 5 evaluations" in page.read_text()
    with pytest.raises(OSError, match="create the folder"):  # before a cell is made
        papers_table._main(["--output", str(tmp_path / "absent" / "cells.json")])


def test_every_learner_but_auto_is_in_the_kept_results() -> None:
    assert {entry.settings["method"] for entry in papers_table._ENTRIES} == set(LEARNERS) - {"auto"}
    kept = Path(__file__).parents[2] / "benchmarks" / "results" / "papers.json"
    cells = json.loads(kept.read_text(encoding="utf-8"))
    assert {key.partition("|")[2] for key in cells} == set(MIXTURES)
    assert not [key for key, found in cells.items() if found.get("behind")]
    # the paper's ablation: decoupled times bring a gain
    for name in ("EDM", "flow"):
        with_times, without = (
            cells[f"LD3, UniPC{part}|{name}"]["learned"] for part in ("", ", no network times")
        )
        assert with_times < 0.95 * without
