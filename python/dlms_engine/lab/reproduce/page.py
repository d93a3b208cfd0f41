"""A reproduction as Markdown and as one HTML page that needs nothing else."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ...support.files import write_text
from ..pages import Table, html_page, markdown_page, number

_Row = Mapping[str, Any]
_Cell = Callable[[_Row], str]


def write_pages(result: Mapping[str, Any], folder: Path, *, command: str = "") -> list[Path]:
    """``STEM.md`` and ``STEM.html`` beside ``STEM.json``; returns what was written."""
    stem = folder / f"{result['table']}-{result['data']}"
    found = [stem.with_suffix(".md"), stem.with_suffix(".html")]
    write_text(found[0], reproduction_markdown(result, command=command))
    write_text(found[1], html_page(_title(result), _parts(result), command=command))
    return found


def reproduction_markdown(result: Mapping[str, Any], *, command: str = "") -> str:
    """Title, conditions, the tables beside the published figures, and what differs."""
    head = [f"# {_title(result)}", *([f"    {command}"] if command else [])]
    return markdown_page([*head, *_parts(result)])


def _parts(result: Mapping[str, Any]) -> list[str | Table]:
    parts: list[str | Table] = [*_conditions(result)]
    for caption, table in _tables(result):
        parts += [f"## {caption}", table]
    if said := _remarks(result):
        parts += ["## What differs", "\n".join(f"- {line}" for line in said)]
    return parts


def _title(result: Mapping[str, Any]) -> str:
    return f"Table {result['number']}: {result['title']} ({result['data']})"


def _conditions(result: Mapping[str, Any]) -> list[str]:
    settings = result["settings"]
    first, count = settings["first_seed"], settings["samples"]
    seeds = ", ".join(map(str, settings["training_seeds"]))
    said = [
        f"{result['paper']}, Table {result['number']}. {count:,} samples, seeds {first} to "
        f"{first + count - 1}; distillations with seed {seeds}. Endpoint RMSE: the first "
        f"{min(settings['exact_samples'], count):,} samples against exact solutions "
        f"({settings['exact_nfe']} evaluations) from the same noise. torch {result['torch']}."
    ]
    if not result["fid"]:
        said.append(
            f"No FID was measured: neither this distance nor the RMSE is FID, and they cannot be "
            f"compared with the published figures. {result['distance']}: to accurate samples of other "
            f"seeds ({settings['accurate_nfe']} evaluations); accurate samples of the same seeds have "
            f"{number(result['floor'])}."
        )
    return said


def _tables(result: Mapping[str, Any]) -> list[tuple[str, Table]]:
    def published(row: _Row) -> str:
        spread = row["published_spread"]
        return f"{row['published']:.2f}" + ("" if spread is None else f" ± {spread:.2f}")

    def measured(row: _Row) -> str:
        spread = row.get("spread")
        return number(row["distance"]) + ("" if spread is None else f" ± {number(spread)}")

    def both(row: _Row) -> str:
        here = measured(row) if "distance" in row else "-"
        return f"{here} ({published(row)})"

    def rmse(row: _Row) -> str:
        return number(row["rmse"])

    made = [row for row in result["rows"] if "distance" in row]
    found = [("Endpoint RMSE", _pivot(made, rmse))] if result["settings"]["exact_samples"] else []
    if result["fid"]:
        return [("FID, and as published in brackets", _pivot(result["rows"], both)), *found]
    return [
        (str(result["distance"]), _pivot(made, measured)),
        *found,
        ("FID as published", _pivot(result["rows"], published)),
    ]


def _pivot(rows: Sequence[_Row], cell: _Cell) -> Table:
    """A line a solver, a column an nfe."""
    nfes = sorted({row["nfe"] for row in rows})
    names = list(dict.fromkeys(row["row"] for row in rows))
    held = {(row["row"], row["nfe"]): cell(row) for row in rows}
    lines = [(False, [name, *(held.get((name, nfe), "") for nfe in nfes)]) for name in names]
    return Table(["solver", *map(str, nfes)], lines)


def _remarks(result: Mapping[str, Any]) -> list[str]:
    """Refusals, notes, and rows that are published only; each once."""
    said = [
        f"{held['file']} is not the published file: SHA-256 {held['sha256']}, not {held['published']}"
        for held in result["files"]
        if held["published"] not in (None, held["sha256"])
    ]
    taken, paper = result["settings"]["samples"], result["paper_samples"]
    if taken < paper:
        said.append(f"{taken:,} samples in place of {paper:,}: the distance is biased upwards")
    for row in result["rows"]:
        if "refused" in row:
            said.append(f"{row['row']}, {row['nfe']} evaluations: refused: {row['refused']}")
        elif "distance" not in row:
            said.append(f"{row['row']}: not made here, as published")
        said += [f"{row['row']}: {note}" for note in row.get("notes", [])]
    return list(dict.fromkeys(said))
