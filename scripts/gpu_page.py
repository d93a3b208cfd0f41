"""The measured parts of docs/performance.md, from what ``scripts/gpu_check.sh`` wrote on a GPU.

    python scripts/gpu_page.py [--check] [PAGE [RESULT ...]]

Reads ``benchmarks/results/gpu-*.json``. Of each stage the newest measurement is shown, with the GPU,
the versions and the commit it was made with. A part without a measurement stays empty: the page
then shows the floors on paper alone. ``--check`` writes nothing; status 1 if the page is stale.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gpu_figures import Aim, aims

from dlms_engine.support.files import write_text

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "performance.md"
RESULTS = "gpu-*.json"
BLOCK = re.compile(r"(<!-- measured: (\w+) -->\n)(.*?)(<!-- end measured -->)", re.DOTALL)


@dataclass(frozen=True)
class _Measured:
    """What one stage reported, and the machine it ran on."""

    report: Mapping[str, Any]
    machine: Mapping[str, Any]
    status: str
    said: str
    started: str

    @property
    def source(self) -> str:
        """GPU, versions, commit and day."""
        facts = self.machine
        packages = facts.get("packages", {})
        return (
            f"{facts['gpu']}, driver {facts['driver']}, torch {facts['torch']}, CUDA "
            f"{facts['cuda']}, triton {packages.get('triton')}, diffusers "
            f"{packages.get('diffusers')}, Python {facts['python']}, commit {facts['commit']}, "
            f"{self.started[:10]}"
        )


def newest(files: Iterable[Mapping[str, Any]]) -> dict[str, _Measured]:
    """The newest report of each stage.

    Raises:
        ValueError: a rehearsal, which measured nothing, or a file without a GPU.
    """
    latest: dict[str, _Measured] = {}
    for file in sorted(files, key=lambda f: str(f["started"])):
        machine = file.get("machine") or {}
        if file.get("rehearsal") or "gpu" not in machine:
            raise ValueError(f"the result of {file['started']} was not measured on a GPU")
        machine = {**machine, "copy_bytes_per_s": file.get("copy_bytes_per_s")}
        for entry in file["stages"]:
            report = file["results"].get(entry["stage"], {})
            said = (entry["status"], entry.get("said", ""), str(file["started"]))
            latest[entry["stage"]] = _Measured(report, machine, *said)
    return latest


def table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def size(shape: Sequence[int]) -> str:
    """``64x3x256x256``."""
    return "x".join(map(str, shape))


def micro(value: float | None) -> str:
    """Microseconds with three digits."""
    return "" if value is None else f"{value:.3g}" if value < 1000 else f"{value:.0f}"


def machine_part(stages: Mapping[str, _Measured]) -> str:
    """The machine and the figures to reach."""
    first = stages.get("import")
    if first is None:
        return ""
    copy = first.machine.get("copy_bytes_per_s")
    said = f"Measured on: {first.source}."
    if copy:
        said += f" A device-to-device copy moves {copy / 1e12:.2f} TB/s, read plus written."
    reports = {name: stage.report for name, stage in stages.items()}
    judged = [row for aim in aims() if (row := _aim(aim, reports))]
    if judged:
        said += "\n\n" + table(("figure", "to reach", "measured", ""), judged)
    return said


def _aim(aim: Aim, reports: Mapping[str, Any]) -> tuple[str, str, str, str] | None:
    value = aim.value(reports)
    if value is None:
        return None
    reached = "reached" if aim.reached(value) else "missed"
    return aim.what, f"{aim.sense} {aim.limit:g} {aim.unit}", f"{value:.3g} {aim.unit}", reached


def row_part(stages: Mapping[str, _Measured]) -> str:
    """One row, launched alone and inside a graph."""
    if "bench-row" not in stages or not stages["bench-row"].report.get("rows"):
        return ""
    rows = [
        (
            size(r["shape"]),
            r["network_dtype"],
            r["name"],
            micro(r["p50_us"]),
            f"{micro(r['p20_us'])} to {micro(r['p80_us'])}",
            f"{100 * r['fraction_of_copy']:.1f} %",
        )
        for r in stages["bench-row"].report["rows"]
    ]
    heads = ("shape", "network", "way", "median, us", "p20 to p80", "of the copy bandwidth")
    return _from(stages["bench-row"], table(heads, rows))


def step_part(stages: Mapping[str, _Measured]) -> str:
    """A step, every way that was measured in its own column."""
    parts = []
    for name in ("bench-step", "bench-compiled"):
        rows = [
            (
                f"{size(case['shape'])}, {case['network_dtype']}",
                r["solver"],
                r["way"],
                micro(r["p50_us"]),
                f"{100 * r['fraction_of_copy']:.1f} %",
                "" if r.get("times_in_graph") is None else f"{r['times_in_graph']:.1f}",
            )
            for case in (stages[name].report.get("cases", ()) if name in stages else ())
            for r in case["rows"]
        ]
        if rows:
            heads = ("shape, network", "solver", "way", "median, us", "of the copy bandwidth")
            parts.append(_from(stages[name], table((*heads, "times the in-graph step"), rows)))
    return "\n\n".join(parts)


def loop_part(stages: Mapping[str, _Measured]) -> str:
    """A whole run, on both clocks."""
    if "bench-loop" not in stages or not stages["bench-loop"].report.get("summary"):
        return ""
    report = stages["bench-loop"].report
    rows = []
    for key, clock in (("milliseconds", "one run"), ("back_to_back", "back to back")):
        summary = report["summary"].get(key) or {}
        rows += [
            (clock, way, *(f"{quantiles[p]:.3f}" for p in ("p20", "p50", "p80")))
            for way, quantiles in summary.items()
            if isinstance(quantiles, Mapping)
        ]
    return _from(stages["bench-loop"], table(("clock", "way", "p20, ms", "p50", "p80"), rows))


def distil_part(stages: Mapping[str, _Measured]) -> str:
    """Seconds to distil, and updates per second."""
    parts = []
    for name in ("distil-32", "distil-32-captured"):
        for check in stages[name].report.get("checks", ()) if name in stages else ():
            figures = check.get("figures")
            if figures:
                way = ", captured evaluations" if figures.get("captured") else ""
                parts.append(
                    _from(
                        stages[name],
                        f"DLMS at 5 evaluations, {figures['trajectories']} trajectories, on "
                        f"{figures['model']}{way}: {figures['seconds']:.1f} s; its score fell from "
                        f"{figures['score_before']:.4g} to {figures['score_after']:.4g}.",
                    )
                )
    for name in ("bench-distill", "bench-distill-captured", "bench-distill-cpu"):
        rows = [
            (
                r["model"],
                r["method"],
                r["device"],
                str(r["batch"]),
                f"{r['updates_per_s']:.3g}",
                r["unit"],
            )
            for r in (stages[name].report.get("rows", ()) if name in stages else ())
            if "updates_per_s" in r
        ]
        if rows:
            heads = ("model", "learner", "device", "batch", "a second", "of")
            parts.append(_from(stages[name], table(heads, rows)))
    return "\n\n".join(parts)


def checks_part(stages: Mapping[str, _Measured]) -> str:
    """What became of every stage that is no benchmark."""
    rows = [
        (name, stage.status, stage.said, stage.started[:10])
        for name, stage in stages.items()
        if not name.startswith("bench")
    ]
    if not rows:
        return ""
    note = "Seconds are those of 20 updates on a GPU shared with the other checks."
    return f"{table(('stage', 'outcome', 'what it said', 'day'), rows)}\n\n{note}"


PARTS: dict[str, Callable[[Mapping[str, _Measured]], str]] = {
    "machine": machine_part,
    "row": row_part,
    "step": step_part,
    "loop": loop_part,
    "distil": distil_part,
    "checks": checks_part,
}


def _from(stage: _Measured, text: str) -> str:
    return f"{text}\n\n*{stage.source}*"


def filled(page: str, files: Sequence[Mapping[str, Any]]) -> str:
    """``page`` with every measured part written anew.

    Raises:
        ValueError: a mark that names no part, a part without its mark, a file of a rehearsal.
    """
    stages = newest(files)
    names = [match[2] for match in BLOCK.finditer(page)]
    if sorted(names) != sorted(PARTS):
        raise ValueError(f"the page has the marks {names}, expected each of {list(PARTS)} once")

    def part(match: re.Match[str]) -> str:
        text = PARTS[match[2]](stages)
        return f"{match[1]}{f'{chr(10)}{text}{chr(10) * 2}' if text else ''}{match[4]}"

    return BLOCK.sub(part, page)


def make_page(arguments: list[str] | None = None) -> int:
    """Command line."""
    parser = argparse.ArgumentParser(prog="python scripts/gpu_page.py", description=__doc__)
    parser.add_argument("page", type=Path, nargs="?", default=PAGE)
    parser.add_argument("results", type=Path, nargs="*", help="benchmarks/results/gpu-*.json")
    parser.add_argument("--check", action="store_true", help="write nothing; 1 if stale")
    args = parser.parse_args(arguments)
    paths = args.results or sorted((ROOT / "benchmarks" / "results").glob(RESULTS))
    before = args.page.read_text(encoding="utf-8")
    after = filled(before, [json.loads(path.read_text(encoding="utf-8")) for path in paths])
    if args.check:
        print("stale" if before != after else "current")
        return int(before != after)
    write_text(args.page, after)
    return 0


if __name__ == "__main__":
    sys.exit(make_page())
