"""``dlms inspect``."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Annotated, Any

import typer

from .common import JsonOption, emit


def inspect(
    file: Annotated[Path, typer.Argument(help="Solver file.", exists=True)],
    as_json: JsonOption = False,
) -> None:
    """Print a solver file: what it is, its numbers and its checksum."""
    from ..policies.distilled import load_solver
    from ..solvers.file import solver_file
    from ..solvers.policy import policy_of

    file = solver_file(file)
    held = load_solver(file)
    policy = policy_of(held)
    described = policy.describe()
    kind, name = described.pop("kind"), described.pop("name")
    options = described.pop("options", {})
    facts: dict[str, Any] = {
        "file": file,
        "bytes": file.stat().st_size,
        "sha256": hashlib.sha256(file.read_bytes()).hexdigest(),
        "method": getattr(held, "method", name),
        "kind": kind,
        "nfe": policy.nfe,
        "depth": policy.depth,
        "prediction": policy.prediction,
        "process": policy.process.config(),
        "settings": options if held is policy else held.settings,
        "best": getattr(held, "best", {}),
    }
    facts |= described
    emit(facts, as_json, [] if as_json else _lines(facts, described))


def _lines(facts: dict[str, Any], table: dict[str, Any]) -> list[str]:
    from ..processes.base import config_summary

    lines = [f"{facts['file']}"]
    for key in ("method", "kind", "nfe", "depth", "prediction", "process", "bytes", "sha256"):
        value = config_summary(facts[key]) if key == "process" else facts[key]
        lines.append(f"  {key:12} {value}")
    for key in ("settings", "best"):
        values = facts[key].items()
        lines.extend(f"  {key}.{name} = {_short(value)}" for name, value in values)
    for key in ("grid", "initial_grid"):
        if key in table:
            lines.append(f"  {key:12} " + "  ".join(f"{t:.5g}" for t in table[key]))
    if "parameters" in table:
        lines.append(f"  {'parameters':12} {table['parameters']:,} (rows are computed per sample)")
    if "rows" in table:
        lines.append("  row  network time            a  b (newest output first)")
        for index, row in enumerate(table["rows"]):
            weights = "  ".join(f"{weight:+.5f}" for weight in row["b"])
            lines.append(f"  {index:3}  {row['time']:12.6g}  {row['a']:+11.6f}  {weights}")
    return lines


def _short(value: Any) -> Any:
    """``value``; of a report, which has a page of numbers, the choice beside its baseline."""
    if not (isinstance(value, dict) and {"chosen", "base", "rmse", "ratio"} <= set(value)):
        return value
    return (
        f"{value['chosen']}, RMSE {value['rmse']:.4g}; the best handcrafted solver, {value['base']}, "
        f"has {value['ratio']:.2f} times that (--json prints the whole report)"
    )
