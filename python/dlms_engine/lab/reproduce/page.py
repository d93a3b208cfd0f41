"""A reproduction as Markdown and as one HTML page that needs nothing else."""

from __future__ import annotations

import html
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ...support.files import write_text
from ..comparison.page import STYLE
from ..record.report import number

_Row = Mapping[str, Any]
_Cell = Callable[[_Row], str]
_Table = tuple[list[str], list[list[str]]]


def write_pages(result: Mapping[str, Any], folder: Path, *, command: str = "") -> list[Path]:
    """``STEM.md`` and ``STEM.html`` beside ``STEM.json``; returns what was written."""
    stem = folder / f"{result['table']}-{result['data']}"
    found = [stem.with_suffix(".md"), stem.with_suffix(".html")]
    write_text(found[0], reproduction_markdown(result, command=command))
    write_text(found[1], _html(result, command))
    return found


def reproduction_markdown(result: Mapping[str, Any], *, command: str = "") -> str:
    """Title, conditions, the tables beside the published figures, and what differs."""
    parts = [f"# {_title(result)}", *([f"    {command}"] if command else []), *_conditions(result)]
    for caption, (head, rows) in _tables(result):
        lines = ["| " + " | ".join(head) + " |", "|---|" + "---:|" * (len(head) - 1)]
        lines += ["| " + " | ".join(row) + " |" for row in rows]
        parts += [f"## {caption}", "\n".join(lines)]
    said = _remarks(result)
    parts += ["## What differs", "\n".join(f"- {line}" for line in said)] if said else []
    return "\n\n".join(parts) + "\n"


def _html(result: Mapping[str, Any], command: str) -> str:
    def row(cells: Sequence[str], tag: str) -> str:
        return "<tr>" + "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in cells) + "</tr>"

    title = html.escape(_title(result))
    parts = [
        '<!doctype html><html lang="en"><head><meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<title>{title}</title><style>{STYLE} td:first-child {{ text-align: left; }}</style>",
        f"</head><body><h1>{title}</h1>",
        f"<p><code>{html.escape(command)}</code></p>" if command else "",
        *(f"<p>{html.escape(text)}</p>" for text in _conditions(result)),
    ]
    for caption, (head, rows) in _tables(result):
        body = "".join(row(cells, "td") for cells in rows)
        parts.append(f"<h2>{html.escape(caption)}</h2>")
        parts.append(f"<table><thead>{row(head, 'th')}</thead><tbody>{body}</tbody></table>")
    said = "".join(f"<li>{html.escape(line)}</li>" for line in _remarks(result))
    parts.append(f"<h2>What differs</h2><ul>{said}</ul>" if said else "")
    return "\n".join([*parts, "</body></html>"])


def _title(result: Mapping[str, Any]) -> str:
    return f"Table {result['number']}: {result['title']} ({result['data']})"


def _conditions(result: Mapping[str, Any]) -> list[str]:
    settings = result["settings"]
    first, count = settings["first_seed"], settings["samples"]
    seeds = ", ".join(map(str, settings["seeds"]))
    said = [
        f"{result['paper']}, Table {result['number']}. {count:,} samples, seeds {first} to "
        f"{first + count - 1}; distillations with seed {seeds}. Endpoint RMSE: the first "
        f"{min(settings['rmse_samples'], count):,} samples against exact solutions "
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


def _tables(result: Mapping[str, Any]) -> list[tuple[str, _Table]]:
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
    found = [("Endpoint RMSE", _pivot(made, rmse))] if result["settings"]["rmse_samples"] else []
    if result["fid"]:
        return [("FID, and as published in brackets", _pivot(result["rows"], both)), *found]
    return [
        (str(result["distance"]), _pivot(made, measured)),
        *found,
        ("FID as published", _pivot(result["rows"], published)),
    ]


def _pivot(rows: Sequence[_Row], cell: _Cell) -> _Table:
    """A line a solver, a column an nfe."""
    nfes = sorted({row["nfe"] for row in rows})
    names = list(dict.fromkeys(row["row"] for row in rows))
    held = {(row["row"], row["nfe"]): cell(row) for row in rows}
    lines = [[name, *(held.get((name, nfe), "") for nfe in nfes)] for name in names]
    return ["NFE", *map(str, nfes)], lines


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
