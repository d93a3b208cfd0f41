"""What a distillation reached, said with its measure, the start's value and their ratio."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

_log = logging.getLogger("dlms_engine")

MEASURES = {
    "rmse": "endpoint RMSE to the exact solution",
    "features": "mean squared feature distance to the exact solution",
    "product": "endpoint RMSE x root of the mean squared feature distance, to the exact solution",
}
# Learners with one measure of their own, and where their history has the start's value.
_OWN = {
    "amed": (MEASURES["rmse"], "validation/raw"),
    "ld3": ("validation loss: distance of the ends to the teacher's", "validation"),
    "dode": ("RMSE to the teacher after the last row", "rmse_before"),
    "gits": (MEASURES["rmse"], ""),
}


def measure_of(method: str, settings: Mapping[str, Any]) -> str:
    """In words, what ``best["score"]`` of this learner is; "score" where it is not known."""
    chosen = settings.get("score")
    if isinstance(chosen, str) and chosen in MEASURES:
        return MEASURES[chosen]
    return _OWN.get(method, ("score", ""))[0]


def start_value(method: str, history: Sequence[Mapping[str, Any]]) -> float | None:
    """The same measure before training, None where the history does not have it."""
    own = _OWN.get(method, ("", ""))[1]
    for name in ("validation/raw", own):
        # D-ODE has one entry a row: its measure is that of the last
        for entry in reversed(history) if method == "dode" else history:
            if name and isinstance(entry.get(name), int | float):
                return float(entry[name])
    return None


def curve_drawn(
    history: Sequence[Mapping[str, Any]], plot: Path | None, title: str, output: Path
) -> Path | None:
    """Draws the loss curve; None where there is no ``plot``, or nothing to draw, which is a warning."""
    if plot is None:
        return None
    from ..lab.plots import loss_curve

    try:
        return loss_curve(history, plot, step="update", title=title)
    except (OSError, ValueError) as error:  # the training is done, its outcome is still to be said
        _log.warning("%s is written, but %s is not: %s", output, plot, error)
        return None


def _number(value: float | None) -> str:
    return "not finite" if value is None else f"{value:.4g}"


def _doubt(report: Mapping[str, Any]) -> list[str]:
    """What the exact solution's own error makes of the ratio, where it is more than a fifth."""
    exact = report.get("exact")
    if exact is None or exact["holds"]:
        return []
    return [
        f"  the exact solution is known to {exact['disagreement']:.2g} only: the true error may be as "
        "much higher or lower, and the ratio with it"
    ]


def outcome_lines(
    method: str,
    settings: Mapping[str, Any],
    history: Sequence[Mapping[str, Any]],
    best: Mapping[str, Any],
) -> list[str]:
    """Lines for people: the best value, the start's, how many times lower it is."""
    report = best.get("report")
    if isinstance(report, Mapping):  # method auto measures its base on the same samples
        low, high = report["ratio_interval"]
        reached = f"  {MEASURES['rmse']} (lower is better): {report['rmse']:.4g}"
        if report["chosen"] == "base":
            return [
                f"{reached}, that of the best handcrafted solver, {report['base']}, which is kept: "
                "nothing learned within the budget beat it"
            ]
        return [
            f"{reached}, {report['ratio']:.2f} times below the best handcrafted solver, "
            f"{report['base']} ({low:.2f} to {high:.2f})",
            f"  kept: {report['chosen']}",
            *_doubt(report),
        ]
    compared = best.get("compared")
    if isinstance(compared, Mapping) and compared.get("kept") == "base":
        return [
            f"  {MEASURES['rmse']} (lower is better): {best['score']:.4g}, that of its base, "
            f"{compared['base']}, which is kept: what was learned ({_number(compared['learned'])}) "
            "is not nearer beyond chance"
        ]
    score = best.get("score")
    if not isinstance(score, int | float):
        return []
    lines = [f"  {measure_of(method, settings)} (lower is better): {score:.4g}"]
    start = start_value(method, history)
    if start is not None and score > 0:
        lines[0] += f"; before training {start:.4g}, {start / score:.2f} times as much"
    if isinstance(compared, Mapping) and compared.get("base_rmse"):
        lines.append(
            f"  {MEASURES['rmse']} on {compared['samples']} new samples: "
            f"{_number(compared['learned'])}; of its base, {compared['base']}: "
            f"{_number(compared['base_rmse'])}"
        )
    if "set" in best:
        lines.append(f"  parameters kept: {best['set']}")
    return lines
