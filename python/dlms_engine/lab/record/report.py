"""A quality record as markdown and as plots."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .. import plots
from ..evaluation.frechet import LABEL
from .rows import best, figure, rank

_Row = Mapping[str, Any]


def record_markdown(record: Mapping[str, Any]) -> str:
    """The tables of a record, with the conditions they were measured under."""
    settings, rows = record["settings"], record["rows"]
    floors = record["floors"]["full"]
    label = record.get("distance", LABEL)
    to_data = f" and {floors['data']:.4g} to the data" if "data" in floors else ""
    parts = [
        f"Endpoint RMSE: {settings['compared_samples']:,} samples against the exact solution "
        f"({settings['exact_nfe']} evaluations) from the same noise. {label}: "
        f"{settings['compared_samples']:,} samples, and {settings['samples']:,} at "
        f"{', '.join(map(str, settings['full_nfes']))} evaluations, minus the floor, i.e. what "
        f"accurate samples ({settings['accurate_nfe']} evaluations) of the same seeds have; with "
        f"{settings['samples']:,} samples that is {floors['accurate']:.4g} to accurate samples of "
        f"other seeds{to_data}. Every handcrafted solver was screened "
        f"on {settings['screen_samples']:,} samples; compared are the best {settings['shortlist']} "
        "by RMSE and half as many by distance. Figures in brackets are screening figures.",
        _finals(rows, settings["nfes"], tuple(floors)),
        "Endpoint RMSE of every solver:",
        _matrix(rows, settings["nfes"], "rmse"),
        f"{label} to accurate samples minus the floor, every solver:",
        _matrix(rows, settings["nfes"], "accurate"),
    ]
    return "\n\n".join(parts) + "\n"


def _finals(rows: Sequence[_Row], nfes: Sequence[int], sides: tuple[str, ...]) -> str:
    lines = [
        "| NFE | solver | endpoint RMSE | " + " | ".join(f"distance to {s}" for s in sides) + " |",
        "|---:|---|---:|" + "---:|" * len(sides),
    ]
    for nfe in nfes:
        listed = [row for row in rows if row["nfe"] == nfe and "compared" in row]
        for row in sorted(listed, key=lambda row: (not row["learned"], figure(row, "accurate"))):
            name = f"**{row['solver']}**" if row["learned"] else row["solver"]
            figures = " | ".join(number(figure(row, by)) for by in ("rmse", *sides))
            lines.append(f"| {nfe} | {name} | {figures} |")
    return "\n".join(lines)


def _matrix(rows: Sequence[_Row], nfes: Sequence[int], by: str) -> str:
    """Solvers against nfe, the best mean rank first."""
    cells: dict[str, dict[int, str]] = {}
    ranks: dict[str, list[float]] = {}
    for nfe in nfes:
        ranked = sorted((r for r in rows if r["nfe"] == nfe), key=lambda r: rank(figure(r, by)))
        for position, row in enumerate(ranked):
            shown = number(figure(row, by))
            name = f"**{row['solver']}**" if row["learned"] else str(row["solver"])
            certain = "compared" in row
            cells.setdefault(name, {})[nfe] = shown if certain else f"({shown})"
            ranks.setdefault(name, []).append(position / len(ranked))
    lines = ["| solver | " + " | ".join(map(str, nfes)) + " |", "|---|" + "---:|" * len(nfes)]
    for name in sorted(cells, key=lambda name: sum(ranks[name]) / len(ranks[name])):
        lines.append(f"| {name} | " + " | ".join(cells[name].get(nfe, "") for nfe in nfes) + " |")
    return "\n".join(lines)


def number(value: float) -> str:
    """Four significant digits, no exponent for ordinary sizes."""
    if not math.isfinite(value):
        return "-"
    return f"{value:.4f}" if abs(value) < 1 else f"{value:.4g}"


def draw_record(record: Mapping[str, Any], folder: Path) -> list[Path]:
    """Quality against NFE, one picture a figure; returns what was written."""
    label = record.get("distance", LABEL)
    names = {
        "rmse": "endpoint RMSE",
        "accurate": f"{label}\nto accurate samples, above the floor",
        "data": f"{label}\nto the data, above the floor",
    }
    if "data" not in record["floors"]["full"]:
        del names["data"]
    return [
        plots.quality(
            *_curves(record, by),
            folder / f"quality-{by}.png",
            ylabel=label,
            title="Quality for the cost (lower is better)",
        )
        for by, label in names.items()
    ]


def _curves(
    record: Mapping[str, Any], by: str
) -> tuple[dict[str, dict[int, float]], dict[str, dict[int, float]]]:
    """Handcrafted: those that are best somewhere. Learned: all, one curve a method."""
    rows, nfes = record["rows"], record["settings"]["nfes"]
    winners = {row["solver"] for nfe in nfes if (row := best(rows, nfe, learned=False, by=by))}
    hand: dict[str, dict[int, float]] = {}
    learned: dict[str, dict[int, float]] = {}
    for row in rows:
        value = figure(row, by)
        if row["learned"]:
            curve = learned.setdefault(str(row["facts"].get("method", row["solver"])), {})
        elif row["solver"] in winners:
            curve = hand.setdefault(row["solver"], {})
        else:
            continue
        curve[row["nfe"]] = max(value, 1e-6)  # an excess may be negative; the axis is logarithmic
    return hand, learned
