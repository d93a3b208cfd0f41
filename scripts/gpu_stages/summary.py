"""What is printed last: a table of the stages, what failed, and the figures."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from runner import Outcome

WIDTH = 150
TAIL = 12
"""Lines of a failed stage's log."""


def headline(outcome: Outcome, report: Mapping[str, Any] | None, log: Path) -> str:
    """What a stage said, in a few words."""
    text = log.read_text(errors="replace") if log.is_file() else ""
    if report and "checks" in report:
        states = [entry["status"] for entry in report["checks"]]
        parts = [f"{states.count('passed')} of {len(states)} checks passed"]
        parts += [
            f"{states.count(s)} {s}" for s in ("failed", "absent", "not reached") if s in states
        ]
        seconds = [
            e["figures"]["seconds"] for e in report["checks"] if "seconds" in e.get("figures", {})
        ]
        return ", ".join(parts) + (f"; {seconds[0]:.1f} s" if seconds else "")
    if outcome.stage.name.startswith("tests"):
        return test_outcomes(text)
    for kind in ("ERROR SUMMARY", "RACECHECK SUMMARY"):
        lines = [line for line in text.splitlines() if kind in line]
        if lines:
            return lines[-1].strip("= ")
    return ""


def test_outcomes(text: str) -> str:
    """pytest's last line, or what was counted until it was ended."""
    last = [
        ln for ln in text.splitlines() if re.search(r"\d+ (passed|failed|error|tests? col)", ln)
    ]
    if last:
        return last[-1].strip("= ")
    words = ("PASSED", "FAILED", "ERROR")
    counts = {word: len(re.findall(rf"\b{word}\b", text)) for word in words}
    return ", ".join(f"{count} {word.lower()}" for word, count in counts.items() if count)


def figures(reports: Mapping[str, Any]) -> Iterator[str]:
    """The benchmarks' main numbers."""
    for row in reports.get("bench-row", {}).get("rows", ()):
        size = "x".join(map(str, row["shape"]))
        yield (
            f"row   {size:>14} {row['network_dtype']:<9}{row['name']:<20}{row['p50_us']:9.2f} us  "
            f"{100 * row['fraction_of_copy']:6.1f} % of copy"
        )
    for key, each in reports.get("bench-loop", {}).get("summary", {}).items():
        yield (
            f"loop  {key}: {each['times_faster_than_eager']:.2f} times the eager loop, "
            f"{100 * each['overhead']:.2f} % above the bare network"
        )
    for stage in ("bench-step", "bench-compiled"):
        for case in reports.get(stage, {}).get("cases", ()):
            size = "x".join(map(str, case["shape"]))
            for row in case.get("rows", ()):
                gain = row.get("times_in_graph")
                yield (
                    f"step  {size:>14} {row['solver']:<9}{row['way']:<24}{row['p50_us']:9.2f} us"
                    + ("" if gain is None else f"  {gain:6.1f} x in graph")
                )
    for stage in ("bench-distill", "bench-distill-captured", "bench-distill-cpu"):
        for row in reports.get(stage, {}).get("rows", ()):
            rate = row.get("error") or f"{row['updates_per_s']:9.2f} a second ({row['unit']})"
            yield f"learn {row['device']:<5} {row['model']:<9}{row['method']:<30} {rate}"


def failures(reports: Mapping[str, Any]) -> Iterator[str]:
    """Every failed check, in one line."""
    for name, report in reports.items():
        for entry in report.get("checks", ()):
            if entry["status"] in ("failed", "absent"):
                yield f"{entry['status']}: {name}: {entry['check']}: {entry['reason']}"


def tails(outcomes: Sequence[Outcome], reports: Mapping[str, Any], work: Path) -> Iterator[str]:
    """The end of the log of each stage that failed and whose checks do not say why."""
    for outcome in outcomes:
        log = work / f"{outcome.stage.name}.log"
        told = any(
            e["status"] == "failed" for e in reports.get(outcome.stage.name, {}).get("checks", ())
        )
        if not outcome.status.startswith("failed") or told or not log.is_file():
            continue
        lines = log.read_text(errors="replace").splitlines()
        if outcome.stage.name.startswith("tests"):
            short = [line for line in lines if line.startswith(("FAILED", "ERROR"))]
            lines = short[:25] or lines
        yield f"-- end of {log.name}"
        yield from lines[-TAIL if not outcome.stage.name.startswith("tests") else -25 :]


def table(
    outcomes: Sequence[Outcome], reports: Mapping[str, Any], work: Path, *, rehearse: bool
) -> str:
    """Everything, at most about 10,000 characters."""
    lines = [*tails(outcomes, reports, work), *failures(reports), *figures(reports)]
    lines.append(
        f"{'stage':<20}{'status':<26}{'s':>7}  {'would measure' if rehearse else 'result'}"
    )
    for outcome in outcomes:
        log = work / f"{outcome.stage.name}.log"
        said = headline(outcome, reports.get(outcome.stage.name), log)
        if rehearse:
            said = f"{outcome.stage.measures}{f' [{said}]' if said else ''}"
        lines.append(f"{outcome.stage.name:<20}{outcome.status:<26}{outcome.seconds:7.1f}  {said}")
    return "\n".join(line[:WIDTH] for line in lines)
