"""The committed results are what the documentation shows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from dlms_engine.lab.comparison.page import markdown
from dlms_engine.lab.comparison.result import FORMAT, best
from dlms_engine.lab.pages import number

ROOT = Path(__file__).parents[3]
RESULTS = sorted((ROOT / "benchmarks" / "results").glob("compare-*.json"))
QUALITY = ROOT / "benchmarks" / "results" / "quality-embedded-cpu.json"


def read(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


@pytest.mark.parametrize("path", RESULTS, ids=lambda path: path.stem)
def test_page_shows_the_committed_numbers(path: Path) -> None:
    result = read(path)
    name = "benchmark_model.md" if "cifar10-32" in path.stem else "comparison.md"
    page = (ROOT / "docs" / name).read_text(encoding="utf-8")
    table = markdown(result)
    assert table.strip() in page, f"docs/{name} is not what {path.name} holds"
    # planted: another figure is not in the page
    result["rows"][0]["rmse"] *= 1.5
    assert markdown(result).strip() not in page


def quality_line(result: Any, nfe: int) -> str:
    """DLMS at one count beside the best handcrafted solver by each figure."""
    (dlms,) = [row for row in result["rows"] if row["solver"] == "dlms" and row["nfe"] == nfe]
    rmse, distance = (best(result["rows"], nfe, by) for by in ("rmse", "excess_accurate"))
    assert rmse is not None and distance is not None
    cells = [
        f"{nfe} | **{dlms['rmse']:.4f}**",
        f"{rmse['rmse']:.4f} ({rmse['solver']})",
        f"{rmse['rmse'] / dlms['rmse']:.1f}x",
        f"{dlms['excess_accurate']:.4f}",
        f"{distance['excess_accurate']:.4f} ({distance['solver']})",
    ]
    return "| " + " | ".join(cells) + " |"


def test_quality_shows_the_committed_numbers() -> None:
    result = read(QUALITY)
    page = (ROOT / "docs" / "quality.md").read_text(encoding="utf-8")
    for nfe in range(3, 11):
        assert quality_line(result, nfe) in page
    # planted: a better handcrafted solver among those that were compared
    next(row for row in result["rows"] if row["size"] == "full")["rmse"] = 0.001
    assert quality_line(result, 5) not in page


@pytest.mark.parametrize("name", ["README.md", "docs/quality.md"])
def test_the_figures_of_auto_are_the_committed_ones(name: str) -> None:
    (auto,) = [row for row in read(QUALITY)["rows"] if row["solver"] == "auto"]
    page = " ".join((ROOT / name).read_text(encoding="utf-8").split())

    def said(rmse: float) -> str:
        return f"RMSE {rmse:.4f} and distance {auto['excess_accurate']:.4f}"

    assert auto["nfe"] == 5 and said(auto["rmse"]) in page
    assert said(1.5 * auto["rmse"]) not in page  # planted: another figure


def test_every_solver_is_in_the_tables_of_a_record() -> None:
    """Compared ones in the first table, screened ones in brackets below it."""
    result = read(QUALITY)
    text = markdown(result)
    screened = next(row for row in result["rows"] if row["size"] == "screen")
    lines = [line for line in text.splitlines() if line.startswith(f"| {screened['solver']} |")]
    assert len(lines) == 2 and f"({number(screened['rmse'])})" in lines[0]
    assert "builds on" not in text, "a column that no row fills"
    assert text.count("| **dlms** |") == 8 + 2


def test_there_are_results() -> None:
    assert {path.stem for path in RESULTS} >= {
        "compare-embedded-cpu",
        "compare-ablation-cpu",
        "compare-interpolation-cpu",
    }
    assert {read(path)["format"] for path in (*RESULTS, QUALITY)} == {FORMAT}
