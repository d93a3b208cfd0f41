"""A comparison as markdown, as plots and as one HTML file that needs nothing else."""

from __future__ import annotations

import base64
import html
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from ...support.files import write_text
from .. import plots
from ..evaluation.frechet import LABEL
from ..record.report import number
from ..record.rows import rank

_Row = Mapping[str, Any]

COLUMNS = (
    "NFE", "solver", "endpoint RMSE", "distance to accurate", "distance to data", "builds on",
    "RMSE: base / it", "network calls", "seconds",
)  # fmt: skip

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 72rem; margin: 2rem auto; padding: 0 1rem; }
table { border-collapse: collapse; font-size: 0.85rem; }
td, th { padding: 0.2rem 0.6rem; border-bottom: 1px solid #ddd; text-align: right; }
td:nth-child(2), th:nth-child(2), td:nth-child(6), th:nth-child(6) { text-align: left; }
tr.learned td { background: #fbf3f5; }
img { max-width: 100%; }
@media (prefers-color-scheme: dark) {
  body { background: #16181c; color: #e6e6e6; }
  tr.learned td { background: #2a1d22; }
  img { background: #fff; }
}
"""


def _label(result: Mapping[str, Any]) -> str:
    return str(result.get("distance", LABEL))


def _conditions(result: Mapping[str, Any]) -> str:
    """One paragraph: what was measured, and how."""
    s, floors = result["settings"], result["floors"]
    to_data = f", {floors['data']:.4g} to the data" if "data" in floors else ""
    return (
        f"Endpoint RMSE: {s['exact_samples']:,} samples against the exact solution "
        f"({s['exact_nfe']} evaluations) from the same noise. {_label(result)}: "
        f"{s['samples']:,} samples, minus the floor, i.e. what accurate samples "
        f"({s['accurate_nfe']} evaluations) of the same seeds have: "
        f"{floors['accurate']:.4g} to accurate samples of other seeds{to_data}. "
        f"{_cost_of(s)} torch {result['torch']}."
    )


def _cost_of(settings: Mapping[str, Any]) -> str:
    trajectories = settings.get("trajectories")
    spent = (
        f"Budget: {settings['budget']:,} network calls (a pass of one sample in either direction) "
        "for each distillation;"
        if trajectories is None
        else f"Each distillation takes {trajectories:,} start noises;"
    )
    seeds = len(settings.get("training_seeds", ()))
    each = f" Mean and standard error of {seeds} distillations each." if seeds > 1 else ""
    return f"{spent} closed forms and searches take what they need.{each}"


def markdown(result: Mapping[str, Any]) -> str:
    """The conditions and one table."""
    lines = ["| " + " | ".join(COLUMNS) + " |", "|---:|---|---:|---:|---:|---|---:|---:|---:|"]
    for row in ordered(over_seeds(result["rows"])):
        cells = _cells(row, result["rows"])
        if row["learned"]:
            cells[1] = f"**{cells[1]}**"
        lines.append("| " + " | ".join(cells) + " |")
    return f"{_conditions(result)}\n\n" + "\n".join(lines) + "\n"


def ordered(rows: Sequence[_Row]) -> list[_Row]:
    """By evaluations, then by distance to accurate samples; what was refused comes last."""
    return sorted(rows, key=lambda row: (row["nfe"], rank(row.get("excess_accurate"))))


def over_seeds(rows: Sequence[_Row]) -> list[_Row]:
    """One row for the solvers that differ in the seed of their training alone.

    Its figures are the means; ``errors`` holds their standard errors.
    """
    groups: dict[tuple[Any, ...], list[_Row]] = {}
    for row in rows:
        groups.setdefault((row["nfe"], row["solver"], row["learned"]), []).append(row)
    return [_mean(held) if len(held) > 1 else held[0] for held in groups.values()]


def _mean(rows: Sequence[_Row]) -> _Row:
    measured = [row for row in rows if "refused" not in row]
    if len(measured) < 2:
        return [*measured, *rows][0]
    found: dict[str, Any] = {**measured[0], "errors": {}}
    for key, value in measured[0].items():
        if isinstance(value, float) or key in ("forward", "backward"):
            values = [row[key] for row in measured]
            found[key] = type(value)(mean(values))
            found["errors"][key] = stdev(values) / math.sqrt(len(values))
    return found


def base_of(row: _Row, rows: Sequence[_Row]) -> _Row | None:
    """The handcrafted row that ``row`` builds on."""
    for other in rows:
        same = other["nfe"] == row["nfe"] and not other["learned"]
        if same and other["solver"] == row.get("base"):
            return other
    return None


def _cells(row: _Row, rows: Sequence[_Row]) -> list[str]:
    if "refused" in row:
        return [str(row["nfe"]), str(row["solver"]), "-", "-", "-", str(row["refused"]), "", "", ""]
    base = base_of(row, rows)
    ratio = "" if base is None else f"{base['rmse'] / row['rmse']:.2f}"
    calls = f"{row['forward'] + row['backward']:,}" if row["learned"] else ""
    seconds = f"{row['seconds']:.0f}" if row["learned"] else ""
    keys = ("rmse", "excess_accurate", "excess_data")
    figures = [_figure_of(row, key) if key in row else "" for key in keys]
    named = [str(row["nfe"]), str(row["solver"]), *figures]
    return [*named, str(row.get("base") or ""), ratio, calls, seconds]


def _figure_of(row: _Row, key: str) -> str:
    error = row.get("errors", {}).get(key)
    return number(row[key]) + ("" if error is None else f" ± {number(error)}")


def draw(result: Mapping[str, Any], folder: Path) -> list[Path]:
    """Quality against NFE: the learned solvers and the best handcrafted one measured at each count.

    Returns what was written, one picture a figure.
    """
    names = {
        "rmse": "endpoint RMSE",
        "excess_accurate": f"{_label(result)}\nto accurate samples, above the floor",
        "excess_data": f"{_label(result)}\nto the data, above the floor",
    }
    if "data" not in result["floors"]:
        del names["excess_data"]
    found = []
    for key, label in names.items():
        curves: tuple[dict[str, dict[int, float]], ...] = ({}, {})
        for row in over_seeds(result["rows"]):
            if key in row:
                side = curves[row["learned"]].setdefault(row["solver"], {})
                side[row["nfe"]] = max(row[key], 1e-3)  # an excess may be negative; a log axis
        hand = {"best handcrafted": _lowest(curves[0])} if curves[0] else {}
        name = key.removeprefix("excess_")
        title = "Quality for the cost (lower is better)"
        path = folder / f"compare-{name}.png"
        found.append(plots.quality(hand, curves[1], path, ylabel=label, title=title))
    return found


def _lowest(curves: Mapping[str, Mapping[int, float]]) -> dict[int, float]:
    lowest: dict[int, float] = {}
    for held in curves.values():
        for nfe, value in held.items():
            lowest[nfe] = min(value, lowest.get(nfe, math.inf))
    return lowest


def page(result: Mapping[str, Any], folder: Path, *, command: str = "") -> Path:
    """``compare.html``: table, plots and samples in one file, nothing loaded from elsewhere."""
    rows = []
    for row in ordered(over_seeds(result["rows"])):
        cells = "".join(f"<td>{html.escape(cell)}</td>" for cell in _cells(row, result["rows"]))
        rows.append(f'<tr class="{"learned" if row["learned"] else "handcrafted"}">{cells}</tr>')
    head = "".join(f"<th>{name}</th>" for name in COLUMNS)
    shown = [folder / f"samples-{nfe}.png" for nfe in result["settings"]["nfes"]]
    figures = [*draw(result, folder), *(path for path in shown if path.exists())]
    parts = [
        '<!doctype html><html lang="en"><head><meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<title>Solvers compared</title><style>{STYLE}</style></head><body>",
        "<h1>Solvers compared</h1>",
        f"<p><code>{html.escape(command)}</code></p>" if command else "",
        f"<p>{html.escape(_conditions(result))}</p>",
        f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table>",
        *(_figure(path) for path in figures),
        "</body></html>",
    ]
    path = folder / "compare.html"
    write_text(path, "\n".join(parts))
    return path


def _figure(path: Path) -> str:
    data = base64.b64encode(path.read_bytes()).decode("ascii")
    name = html.escape(path.stem.replace("-", " "))
    return f'<figure><img alt="{name}" src="data:image/png;base64,{data}"></figure>'
