"""Tables of `dlms bench step --device cuda`."""

from __future__ import annotations

import math
from typing import Any

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
