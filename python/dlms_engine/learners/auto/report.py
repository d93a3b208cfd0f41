"""What a run found, as JSON, as lines and as one picture."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ...support.files import replacing
from ...support.values import json_value
from ..start import ExactSolution, Start
from .budget import Budget
from .choose import AutoStage, beyond_doubt
from .tail import Comparison

_log = logging.getLogger("dlms_engine")


def report_of(
    start: Start,
    exact: ExactSolution,
    stages: Sequence[AutoStage],
    best: AutoStage,
    compared: Comparison | None,
    budget: Budget,
) -> dict[str, Any]:
    """JSON values: the base, every stage with its errors, the choice and the proof."""
    recorded = [stage.record() for stage in stages]
    smallest = min(stage["rmse"] for stage in recorded)
    proof = exact.against(smallest)
    rmse = best.record()["rmse"] if compared is None else compared.rmse
    value, low, high = (
        (1.0, 1.0, 1.0) if compared is None else (compared.ratio, compared.low, compared.high)
    )
    report: dict[str, Any] = {
        "nfe": start.nfe,
        "base": start.best.label,
        "chosen": best.name,
        "rmse": rmse,
        "ratio": value,
        "ratio_interval": [low, high],
        "ratio_samples": stages[0].record()["samples"] if compared is None else compared.samples,
        "stages": recorded,
        "ranking": start.record()["ranking"][:10],
        "exact": {**proof.__dict__, "holds": proof.holds},
        "calls": budget.calls,
        "seconds": budget.seconds,
    }
    plain: dict[str, Any] = json_value(report)
    return plain


def report_lines(report: dict[str, Any]) -> list[str]:
    """The report for people."""
    lines = [
        f"{'stage':10}  {'RMSE':>9}  {'+-':>8}  {'features':>10}  {'calls':>9}  {'seconds':>7}"
    ]
    for stage in report["stages"]:
        features = stage.get("feature_distance")
        shown = "-" if features is None else f"{features:.4g}"
        error = stage["standard_error"]
        lines.append(
            f"{stage['name']:10}  {_number(stage['rmse']):9.5f}  {0.0 if error is None else error:8.5f}  "
            f"{shown:>10}  {stage['calls']:9,}  {stage['seconds']:7.0f}"
        )
    exact = report["exact"]
    share = exact["disagreement"] / exact["against"] if exact["against"] else float("inf")
    lines.append(
        f"exact solution: {exact['solver']}/{exact['grid']}, {exact['steps']} evaluations, known to "
        f"{exact['disagreement']:.2g}: {100 * share:.0f} % of the smallest error"
        + ("" if exact["holds"] else " - MORE THAN A FIFTH: ratios are not to be trusted")
    )
    low, high = report["ratio_interval"]
    samples = report["stages"][0]["samples"]
    if report["chosen"] == "base":
        lines.append(
            f"chosen: the base, {report['base']}: nothing beat it by two standard errors "
            f"({samples} samples not trained on)"
        )
    else:
        lines.append(
            f"chosen: {report['chosen']}, endpoint RMSE {report['ratio']:.2f} times below the best "
            f"handcrafted solver, {report['base']} ({low:.2f} to {high:.2f}, "
            f"{report.get('ratio_samples', samples)} samples not trained on)"
        )
    return lines + _passed_over(report)


def _passed_over(report: dict[str, Any]) -> list[str]:
    """Why the stage with the smallest error was not taken, where it was not."""
    stages = {stage["name"]: stage for stage in report["stages"]}
    chosen = stages[report["chosen"]]
    least = min(stages.values(), key=lambda each: _number(each["rmse"]))
    if least["name"] == chosen["name"] or _number(least["rmse"]) >= _number(chosen["rmse"]):
        return []
    known = report["exact"]["disagreement"]
    if not beyond_doubt(chosen["rmse"], least["rmse"], known):
        why = f"the exact solution, known to {known:.2g}, may explain the difference"
    elif _number(least["frechet"]) > _number(report["stages"][0]["frechet"]):
        why = "its Frechet distance is above the base's"
    else:
        why = "it is not two standard errors better, or its features are worse"
    return [f"not taken: {least['name']}, RMSE {least['rmse']:.4g}: {why}"]


def _number(value: float | None) -> float:
    """What is None in the report, as it was not finite."""
    return math.inf if value is None else value


def write_report(output: Path, report: dict[str, Any]) -> None:
    """``OUTPUT.report.json`` and, where matplotlib is installed, ``OUTPUT.report.png``."""
    path = output.with_suffix(".report.json")
    with replacing(path) as partial:
        partial.write_text(json.dumps(report, indent=1), encoding="utf-8")
    try:
        draw_report(report, output.with_suffix(".report.png"))
    except ImportError:
        _log.info("no picture of the report: matplotlib is not installed")


def draw_report(report: dict[str, Any], path: Path) -> None:
    """The handcrafted ranking and the stages in one picture, RMSE with two standard errors; what has no
    finite RMSE is left out.

    Raises:
        ImportError: matplotlib is not installed.
    """
    from matplotlib.figure import Figure

    rows = [
        (r["solver"], r["rmse"], r["standard_error"] or 0.0, "0.7")
        for r in report["ranking"][::-1]
        if r["rmse"] is not None
    ]
    colours = {
        "base": "tab:grey",
        "table": "tab:blue",
        "corrector": "tab:green",
        "correctors": "tab:olive",
    }
    for stage in report["stages"]:
        if stage["rmse"] is not None:
            colour = colours.get(stage["name"], "tab:orange")
            rows.append((stage["name"], stage["rmse"], stage["standard_error"] or 0.0, colour))
    figure = Figure(figsize=(7, 0.35 * len(rows) + 1), layout="constrained")
    axes = figure.subplots()
    places = range(len(rows))
    axes.barh(
        places, [r[1] for r in rows], xerr=[2 * r[2] for r in rows], color=[r[3] for r in rows]
    )
    axes.set_yticks(places, [r[0] for r in rows], fontsize=7)
    axes.set_xlabel("endpoint RMSE to the exact solution")
    axes.set_title(
        f"{report['nfe']} evaluations: {report['chosen']}, {report['ratio']:.2f}x below the best "
        "handcrafted solver",
        fontsize=9,
    )
    with replacing(path) as partial:
        figure.savefig(partial, dpi=150, format="png")
