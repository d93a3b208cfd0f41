"""The committed results are what the documentation shows."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from dlms_engine.lab.comparison.page import markdown

ROOT = Path(__file__).parents[3]
RESULTS = sorted((ROOT / "benchmarks" / "results").glob("compare-*.json"))


@pytest.mark.parametrize("path", RESULTS, ids=lambda path: path.stem)
def test_page_shows_the_committed_numbers(path: Path) -> None:
    result = json.loads(path.read_text(encoding="utf-8"))
    page = (ROOT / "docs" / "comparison.md").read_text(encoding="utf-8")
    table = markdown(result)
    assert table.strip() in page, f"docs/comparison.md is not what {path.name} holds"
    # planted: another figure is not in the page
    result["rows"][0]["rmse"] *= 1.5
    assert markdown(result).strip() not in page


def test_there_are_results() -> None:
    assert {path.stem for path in RESULTS} >= {
        "compare-embedded-cpu",
        "compare-ablation-cpu",
        "compare-interpolation-cpu",
    }
