"""The figures that the GPU engine is to reach, read from the reports of ``scripts/gpu_check.sh``."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

Reports = Mapping[str, Any]
"""Stage -> what it wrote."""

SMALL, LARGE, LATENT = [1, 4, 64, 64], [64, 3, 256, 256], [16, 16, 128, 128]


@dataclass(frozen=True)
class Aim:
    """One figure to reach; ``value`` is None where it was not measured."""

    what: str
    sense: Literal["at most", "at least"]
    limit: float
    unit: str
    value: Callable[[Reports], float | None]

    def reached(self, value: float) -> bool:
        """Whether ``value`` is within the limit."""
        return value <= self.limit if self.sense == "at most" else value >= self.limit


def _in_graph(shape: list[int], key: str, scale: float = 1.0) -> Callable[[Reports], float | None]:
    """``key`` of the CUDA row as a node of a graph."""

    def value(reports: Reports) -> float | None:
        for row in reports.get("bench-row", {}).get("rows", ()):
            if row["shape"] == shape and row["name"] == "cuda in a graph":
                return scale * float(row[key])
        return None

    return value


def against_diffusers(shape: list[int]) -> Callable[[Reports], float | None]:
    """Time of diffusers' eager DPM-Solver++(2M) step over that of the in-graph step."""

    def value(reports: Reports) -> float | None:
        for case in reports.get("bench-step", {}).get("cases", ()):
            for row in case["rows"] if case["shape"] == shape else ():
                if (row["solver"], row["way"]) == ("DPM++2M", "diffusers eager"):
                    gain = row.get("times_in_graph")
                    return None if gain is None else float(gain)
        return None

    return value


def one_run(report: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """The summary on the clock that a user waits by, where the run was captured on the real model."""
    settings = report.get("settings", {})
    meant = settings.get("network") == "embedded" and settings.get("batch") == 1
    if not (meant and report.get("captured")):
        return None
    summary: Mapping[str, Any] = report["summary"]["milliseconds"]
    return summary


def against_loop(reports: Reports) -> float | None:
    """The eager loop's time over the captured run's."""
    summary = one_run(reports.get("bench-loop", {}))
    return None if summary is None else float(summary["times_faster_than_eager"])


def above_bare(reports: Reports) -> float | None:
    """Percent of a run above the bare captured evaluations."""
    summary = one_run(reports.get("bench-loop", {}))
    return None if summary is None else 100 * float(summary["overhead"])


def above_bare_us(reports: Reports) -> float | None:
    """Microseconds of a run above the bare captured evaluations."""
    summary = one_run(reports.get("bench-loop", {}))
    if summary is None:
        return None
    return 1e3 * float(summary["engine"]["p50"] - summary["bare network"]["p50"])


def distil_seconds(stage: str) -> Callable[[Reports], float | None]:
    """Seconds to distil DLMS on a 32x32 model."""

    def value(reports: Reports) -> float | None:
        for check in reports.get(stage, {}).get("checks", ()):
            if "seconds" in check.get("figures", {}):
                return float(check["figures"]["seconds"])
        return None

    return value


def aims() -> tuple[Aim, ...]:
    """All of them."""
    share = "share of the copy bandwidth, row in a graph"
    speed = "DPM-Solver++(2M) step in a graph against diffusers' eager one"
    run = "5 evaluations of the embedded model at batch 1"
    distilled = "DLMS at 5 evaluations, 32x32 model, distilled"
    return (
        Aim("row in a graph, 1x4x64x64", "at most", 2.0, "us", _in_graph(SMALL, "p50_us")),
        Aim(
            f"{share}, 64x3x256x256", "at least", 90, "%", _in_graph(LARGE, "fraction_of_copy", 100)
        ),
        Aim(
            f"{share}, 16x16x128x128, bfloat16 network",
            "at least",
            90,
            "%",
            _in_graph(LATENT, "fraction_of_copy", 100),
        ),
        Aim(f"{speed}, 1x4x64x64", "at least", 30, "times faster", against_diffusers(SMALL)),
        Aim(f"{speed}, 64x3x256x256", "at least", 5, "times faster", against_diffusers(LARGE)),
        Aim(f"{run} against the eager loop", "at least", 3, "times faster", against_loop),
        Aim(f"{run} above the bare captured evaluations", "at most", 2, "%", above_bare),
        Aim(f"{run} above the bare captured evaluations", "at most", 30, "us", above_bare_us),
        Aim(distilled, "at most", 60, "s", distil_seconds("distil-32")),
        Aim(f"{distilled}, captured", "at most", 60, "s", distil_seconds("distil-32-captured")),
    )
