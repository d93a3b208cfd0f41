"""Pages that a program writes from kept results are what it would write."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from dlms_engine.lab.any_model import models_page
from dlms_engine.lab.papers_table import papers_page

ROOT = Path(__file__).parents[2]


def written(name: str, found: Any) -> str:
    """The page of the results ``found``, with the command that the kept page has."""
    kept = (ROOT / "docs" / f"{name}.md").read_text(encoding="utf-8")
    command = next(line.strip() for line in kept.splitlines() if line.startswith("    "))
    return papers_page(found, command, 5) if name == "papers" else models_page(found, command)


@pytest.mark.parametrize("name", ["papers", "any_model"])
def test_page_is_that_of_the_kept_results(name: str) -> None:
    path = ROOT / "benchmarks" / "results" / f"{name}.json"
    found = json.loads(path.read_text(encoding="utf-8"))
    page = (ROOT / "docs" / f"{name}.md").read_text(encoding="utf-8")
    assert written(name, found) == page
    # planted: another figure
    if name == "papers":
        found["DLMS|EDM"]["learned"] *= 2
    else:
        found[0]["ratio"] *= 2
    assert written(name, found) != page
