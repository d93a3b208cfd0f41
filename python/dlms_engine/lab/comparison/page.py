"""A comparison as markdown, as plots and as one HTML file that needs nothing else."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any, cast

from ...support.files import write_text
from .. import plots
from ..pages import Table, html_page, markdown_page, number
from .result import Result, ResultRow, best, figure, rank

COLUMNS = (
    "NFE", "solver", "endpoint RMSE", "distance to accurate", "distance to data", "builds on",
    "RMSE: base / it", "network calls", "seconds",
)  # fmt: skip


def publish(result: Result, folder: Path, stem: str, *, command: str = "") -> list[Path]:
    """``STEM.md``, ``STEM.html`` and the pictures, beside the ``STEM.json`` that is there."""
    pictures = draw(result, folder, stem)
    shown = [folder / f"samples-{nfe}.png" for nfe in result["settings"]["nfes"]]
    parts = [*_parts(result), *pictures, *(path for path in shown if path.exists())]
    pages = [folder / f"{stem}.md", folder / f"{stem}.html"]
    write_text(pages[0], markdown(result))
    write_text(pages[1], html_page("Solvers compared", parts, command=command))
    return [*pages, *pictures, folder / f"{stem}.json"]


def markdown(result: Result) -> str:
    """The conditions and the tables."""
    return markdown_page(_parts(result))


def _parts(result: Result) -> list[str | Table]:
    """What was measured, the solvers that were compared, and all that were screened."""
    rows = over_seeds(result["rows"])
    certain = [row for row in rows if row.get("size") != "screen"]
    table = Table(COLUMNS, ((row["learned"], _cells(row, rows)) for row in ordered(certain)))
    parts: list[str | Table] = [_conditions(result), table]
    if len(certain) < len(rows):
        parts += ["Endpoint RMSE of every solver:", _matrix(result, "rmse")]
        caption = f"{_label(result)} to accurate samples minus the floor, every solver:"
        parts += [caption, _matrix(result, "excess_accurate")]
    return parts


def _label(result: Result) -> str:
    return result["distance"]


def _conditions(result: Result) -> str:
    """One paragraph: what was measured, and how."""
    s, floors = result["settings"], result["floors"]["full"]
    to_data = f", {floors['data']:.4g} to the data" if "data" in floors else ""
    samples = f"{s['samples']:,} samples"
    if "full_nfes" in s:
        counts = ", ".join(map(str, s["full_nfes"]))
        samples = f"{s['exact_samples']:,} samples ({s['samples']:,} at {counts} evaluations)"
    return (
        f"Endpoint RMSE: {s['exact_samples']:,} samples against the exact solution "
        f"({s['exact_nfe']} evaluations) from the same noise. {_label(result)}: "
        f"{samples}, minus the floor, i.e. what accurate samples "
        f"({s['accurate_nfe']} evaluations) of the same seeds have: "
        f"{floors['accurate']:.4g} to accurate samples of other seeds{to_data}. "
        f"{_how(s)} torch {result['torch']}."
    )


def _how(settings: Mapping[str, Any]) -> str:
    """How solvers were chosen, or what a distillation could spend."""
    if "shortlist" in settings:
        return (
            f"Every handcrafted solver was screened on {settings['screen_samples']:,} samples; "
            f"compared are the best {settings['shortlist']} by RMSE and half as many by distance. "
            "Figures in brackets are those of the screening."
        )
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


def ordered(rows: Sequence[ResultRow]) -> list[ResultRow]:
    """By evaluations, then by distance to accurate samples; what was refused comes last."""
    return sorted(rows, key=lambda row: (row["nfe"], rank(row.get("excess_accurate"))))


def over_seeds(rows: Sequence[ResultRow]) -> list[ResultRow]:
    """One row for the solvers that differ in the seed of their training alone.

    Its figures are the means; ``errors`` holds their standard errors.
    """
    groups: dict[tuple[Any, ...], list[ResultRow]] = {}
    for row in rows:
        groups.setdefault((row["nfe"], row["solver"], row["learned"]), []).append(row)
    return [_mean(held) if len(held) > 1 else held[0] for held in groups.values()]


def _mean(rows: Sequence[ResultRow]) -> ResultRow:
    measured: list[Any] = [row for row in rows if "refused" not in row]
    if len(measured) < 2:
        return cast(ResultRow, [*measured, *rows][0])
    found: dict[str, Any] = {**measured[0], "errors": {}}
    for key, value in measured[0].items():
        if isinstance(value, float) or key in ("forward", "backward"):
            values = [row[key] for row in measured]
            found[key] = type(value)(mean(values))
            found["errors"][key] = stdev(values) / math.sqrt(len(values))
    return cast(ResultRow, found)


def base_of(row: ResultRow, rows: Sequence[ResultRow]) -> ResultRow | None:
    """The handcrafted row that ``row`` builds on."""
    for other in rows:
        same = other["nfe"] == row["nfe"] and not other["learned"]
        if same and other["solver"] == row.get("base"):
            return other
    return None


def _cells(row: ResultRow, rows: Sequence[ResultRow]) -> list[str]:
    """One for each of ``COLUMNS``."""
    named = [str(row["nfe"]), row["solver"]]
    if "refused" in row:
        return [*named, "-", "-", "-", row["refused"], "", "", ""]
    base = base_of(row, rows)
    own, other = figure(row, "rmse"), None if base is None else figure(base, "rmse")
    ratio = f"{other / own:.2f}" if own and other is not None else ""
    calls = f"{row['forward'] + row['backward']:,}" if "forward" in row else ""
    seconds = f"{row['seconds']:.0f}" if "seconds" in row else ""
    figures = [_figure_of(row, key) for key in ("rmse", "excess_accurate", "excess_data")]
    return [*named, *figures, row.get("base") or "", ratio, calls, seconds]


def _figure_of(row: ResultRow, key: str) -> str:
    value = figure(row, key)
    if value is None:
        return ""
    error = row.get("errors", {}).get(key)
    return number(value) + ("" if error is None else f" ± {number(error)}")


def _matrix(result: Result, by: str) -> Table:
    """Solvers against nfe, the best mean rank first; what was only screened stands in brackets."""
    nfes = result["settings"]["nfes"]
    cells: dict[tuple[bool, str], dict[int, str]] = {}
    ranks: dict[tuple[bool, str], list[float]] = {}
    for nfe in nfes:
        rows = [row for row in result["rows"] if row["nfe"] == nfe]
        for position, row in enumerate(sorted(rows, key=lambda row: rank(figure(row, by)))):
            key, shown = (row["learned"], row["solver"]), _figure_of(row, by)
            screened = row.get("size") == "screen"
            cells.setdefault(key, {})[nfe] = f"({shown})" if screened else shown
            ranks.setdefault(key, []).append(position / len(rows))
    lines = (
        (key[0], [key[1], *(cells[key].get(nfe, "") for nfe in nfes)])
        for key in sorted(cells, key=lambda key: mean(ranks[key]))
    )
    return Table(["solver", *map(str, nfes)], lines)


def draw(result: Result, folder: Path, stem: str) -> list[Path]:
    """Quality against NFE: the learned solvers and the best handcrafted one measured at each count.

    Returns what was written, one picture a figure.
    """
    label = _label(result)
    names = {
        "rmse": "endpoint RMSE",
        "excess_accurate": f"{label}\nto accurate samples, above the floor",
        "excess_data": f"{label}\nto the data, above the floor",
    }
    if "data" not in result["floors"]["full"]:
        del names["excess_data"]
    rows = over_seeds(result["rows"])
    found = []
    for by, ylabel in names.items():
        hand = [best(rows, nfe, by) for nfe in result["settings"]["nfes"]]
        lowest = _lowest(rows, by)
        handcrafted = _curves((("best handcrafted", row) for row in hand if row), by, lowest)
        learned = _curves(((row["solver"], row) for row in rows if row["learned"]), by, lowest)
        path = folder / f"{stem}-{by.removeprefix('excess_')}.png"
        title = "Quality for the cost (lower is better)"
        found.append(plots.quality(handcrafted, learned, path, ylabel=ylabel, title=title))
    return found


def _lowest(rows: Sequence[ResultRow], by: str) -> float:
    """Where a logarithmic axis shows what is lower: an RMSE as it is, an excess, which may be
    negative, at 1e-3, or a thousandth of the largest where all are small.
    """
    if by == "rmse":
        return 0.0
    values = (figure(row, by) for row in rows)
    positive = (v for v in values if v is not None and 0 < v < math.inf)
    return 1e-3 * min(1.0, max(positive, default=1.0))


def _curves(
    rows: Iterable[tuple[str, ResultRow]], by: str, lowest: float
) -> dict[str, dict[int, float]]:
    curves: dict[str, dict[int, float]] = {}
    for name, row in rows:
        value = figure(row, by)
        if value is not None:
            curves.setdefault(name, {})[row["nfe"]] = max(value, lowest)
    return curves
