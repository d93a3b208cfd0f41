"""Tables and figures to reach of `dlms bench step --device cuda`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from . import targets

SMALL, LARGE, LATENT = (1, 4, 64, 64), (64, 3, 256, 256), (16, 16, 128, 128)
TIMED_SOLVERS = ("DPM++2M", "UniPC-2")
EAGER, COMPILED, IN_GRAPH = "diffusers eager", "diffusers torch.compile", "in graph"


def ratios(rows: list[dict[str, Any]]) -> None:
    """`times_in_graph`: each way's median over that of the engine's in-graph step."""
    for row in rows:
        ours = _in_graph(rows, row["solver"])
        row["times_in_graph"] = row["p50_us"] / ours["p50_us"] if ours else None


def _in_graph(rows: list[dict[str, Any]], solver: str) -> dict[str, Any] | None:
    """The in-graph step of the backend that "auto" prefers: CUDA's, Triton's where there is none."""
    found = [r for r in rows if r["solver"] == solver and r["way"].endswith(IN_GRAPH)]
    return found[0] if found else None


def to_reach(cases: Sequence[dict[str, Any]]) -> list[targets.Target]:
    """The figures to reach, from the DPM-Solver++(2M) rows of the cases measured."""
    solver = TIMED_SOLVERS[0]

    def make(
        what: str, limit: float, shape: tuple[int, ...], key: str, unit: str, rival: str | None
    ) -> targets.Target:
        size = "x".join(map(str, shape))
        sense: Any = "at most" if unit == "us" else "at least"
        case = next((c for c in cases if tuple(c["shape"]) == shape), None)
        value, reason = None, "this shape was not measured"
        if case is not None:
            named = [r for r in case["rows"] if (r["solver"], r["way"]) == (solver, rival)]
            row = _in_graph(case["rows"], solver) if rival is None else next(iter(named), None)
            value = None if row is None else row[key]
            reason = "" if value is not None else _why(case, solver, rival)
        return targets.Target(f"{what}, {size}", limit, sense, unit, value, reason)

    copy, speed = "in-graph step, share of copy bandwidth", "in-graph step against eager diffusers"
    return [
        make("in-graph step", 2.0, SMALL, "p50_us", "us", None),
        make(copy, 0.9, LARGE, "fraction_of_copy", "of copy", None),
        make(copy, 0.9, LATENT, "fraction_of_copy", "of copy", None),
        make(f"{speed} {solver}", 30.0, SMALL, "times_in_graph", "times faster", EAGER),
        make(f"{speed} {solver}", 5.0, LARGE, "times_in_graph", "times faster", EAGER),
    ]


def _why(case: dict[str, Any], solver: str, rival: str | None) -> str:
    wanted = rival or IN_GRAPH
    missing = [a for a in case["absent"] if a["solver"] == solver and a["way"].endswith(wanted)]
    return str(missing[0]["reason"]) if missing else f"no {IN_GRAPH} step of the engine"


def print_case(case: dict[str, Any]) -> None:
    """A table of one case."""
    size = "x".join(map(str, case["shape"]))
    megabytes = math.prod(case["shape"]) * 4 / 1e6
    print(
        f"\n{size} network {case['network_dtype']} ({megabytes:.1f} MB of state): microseconds per "
        f"step; copy {case['copy_bytes_per_s'] / 1e12:.2f} TB/s"
    )
    heads = f"{'p20':>10}{'p50':>10}{'p80':>10}{'GB/s':>9}{'of copy':>9}{'/ graph':>9}"
    print(f"  {'solver':<9}{'way':<25}{heads}")
    for r in case["rows"]:
        ratio = "" if r["times_in_graph"] is None else f"{r['times_in_graph']:8.1f}x"
        print(
            f"  {r['solver']:<9}{r['way']:<25}{r['p20_us']:10.2f}{r['p50_us']:10.2f}"
            f"{r['p80_us']:10.2f}{r['bytes_per_s'] / 1e9:9.1f}{r['fraction_of_copy']:9.3f}{ratio:>9}"
        )
    for a in case["absent"]:
        print(f"  {a['solver']:<9}{a['way']:<25}absent: {a['reason']}", flush=True)
