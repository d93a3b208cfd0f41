"""CUDA micro-benchmark of one row, and what both CUDA benchmarks share: timing and roofline.

    python -m dlms_engine.lab.bench.device --json row.json

Every backend is checked against the eager reference before it is timed. Times are CUDA events over
many launches. Cold: buffers rotate through more memory than the L2 cache holds. Warm: one set of
buffers, as in a run whose network has just written F. In-graph times are those of one node of a
captured graph of many rows. The CUDA kernel is timed both ways of reading the ring, whatever way it
would take by itself (`ops.libraries.early_slots_limit`). The JSON is written after each shape.
"""

from __future__ import annotations

import argparse
import contextlib
import math
import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from dlms_engine import ops
from dlms_engine.lab.bench.timing import (
    finish_report,
    json_options,
    machine,
    measure_within,
    save_report,
    say_not_measured,
)
from dlms_engine.ops import layout, libraries, reference

_CASES = (
    ((1, 4, 64, 64), "float32"),
    ((64, 3, 256, 256), "float32"),
    ((16, 16, 128, 128), "bfloat16"),
    ((64, 3, 32, 32), "float32"),
)
"""Shapes and network dtypes, the figures to reach first."""
WARM_BYTES = 1 << 23
"""Rows that move more than this are timed cold only: they do not stay in the cache."""
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class Timing:
    """Microseconds of one row, and the memory traffic that time means."""

    name: str
    shape: tuple[int, ...]
    network_dtype: str
    depth: int
    p20_us: float
    p50_us: float
    p80_us: float
    bytes: int
    fraction_of_copy: float  # (bytes / p50) over the measured copy bandwidth


def row_bytes(
    shape: Sequence[int], network_bytes: int, history: int, guided: bool = False, state: int = 4
) -> int:
    """Least bytes that one in-place row moves: every operand once.

    Read x, F (twice when guided) and `history` earlier slots; write x, m and the network input.
    """
    per_element = state * (3 + history) + network_bytes * (3 if guided else 2)
    return math.prod(shape) * per_element


def quantiles(times: Sequence[float]) -> tuple[float, float, float]:
    """20 %, 50 % and 80 % of the times, by nearest rank."""
    if not times:
        raise ValueError("no times were measured, expected at least one")
    ordered = sorted(times)
    last = len(ordered) - 1
    return ordered[round(0.2 * last)], statistics.median(ordered), ordered[round(0.8 * last)]


def buffers_needed(bytes_per_set: int, cache_bytes: int, limit: int = 256) -> int:
    """Sets of buffers to rotate so that a set is out of the cache when its turn comes again."""
    return max(2, min(limit, math.ceil(3 * cache_bytes / max(1, bytes_per_set))))


def events_us(run: Callable[[int], object], calls: range) -> float:
    """Microseconds of one of `calls`, all of them between two CUDA events."""
    start = torch.cuda.Event(enable_timing=True)
    end = torch.cuda.Event(enable_timing=True)
    start.record()
    for call in calls:
        run(call)
    end.record()
    end.synchronize()
    return float(1e3 * start.elapsed_time(end) / len(calls))


def time_each(run: Callable[[int], object], repeats: int = 20, inner: int = 50) -> list[float]:
    """Microseconds of one call: `repeats` measurements of `inner` calls."""
    for i in range(inner):
        run(i)
    torch.cuda.synchronize()
    return [events_us(run, range(k * inner, (k + 1) * inner)) for k in range(repeats)]


def interleaved_events(
    runs: Sequence[Callable[[int], object]], rounds: int = 20, milliseconds: float = 3.0
) -> list[list[float]]:
    """Microseconds of one call of each run, `[len(runs)][rounds]`, between two CUDA events.

    A round measures every run in turn, as many calls as take about `milliseconds`, so that a busy
    or throttled phase of the machine falls on all of them. ``run(i)`` counts its calls.
    """
    inner = []
    for run in runs:
        once = statistics.median(time_each(run, 3, 3))
        inner.append(max(3, min(2000, round(1e3 * milliseconds / max(once, 0.1)))))
    times: list[list[float]] = [[] for _ in runs]
    for k in range(rounds):
        for own, run, count in zip(times, runs, inner, strict=True):
            own.append(events_us(run, range(k * count, (k + 1) * count)))
    return times


def copy_bandwidth(nbytes: int = 1 << 31) -> float:
    """Bytes/s of a device-to-device copy, bytes read plus bytes written."""
    source = torch.empty(nbytes // 4, dtype=torch.float32, device="cuda").normal_()
    target = torch.empty_like(source)
    microseconds = statistics.median(time_each(lambda _: target.copy_(source), 5, 5))
    return 2 * nbytes / (1e-6 * microseconds)


@dataclass
class Problem:
    """One set of buffers of a row: shapes as in `ops.reference.fused_row`."""

    f: Tensor
    x: Tensor
    ring: Tensor
    row: Tensor
    network_input: Tensor

    @staticmethod
    def make(shape: Sequence[int], dtype: torch.dtype, depth: int, device: str) -> Problem:
        """Random data; weights small, so that repeated rows stay finite."""
        row = torch.full((layout.row_width(depth),), 0.25, device=device)
        row[layout.SLOT] = 0.0
        x = torch.randn(*shape, device=device)
        f = torch.randn(*shape, device=device).to(dtype)
        ring = torch.randn(depth, *shape, device=device)
        return Problem(f, x, ring, row, torch.empty_like(f))

    def step(self, backend: ops.Backend) -> None:
        """One row in place."""
        backend.fused_row_(self.f, None, self.x, self.ring, self.row, self.network_input)


def check_device(backend: ops.Backend, problem: Problem) -> None:
    """RuntimeError unless the backend gives the reference's bits on this problem."""
    want = reference.fused_row(problem.f, None, problem.x, problem.ring, problem.row)
    got = backend.fused_row(problem.f, None, problem.x, problem.ring, problem.row)
    for name, g, w in zip(("x_next", "m", "network_input"), got, want, strict=True):
        if not torch.equal(g, w):
            off = (g.double() - w.double()).abs().max().item()
            raise RuntimeError(
                f"backend {backend.name}: {name} differs from eager by up to {off:.3e}; not timed"
            )


def capture_rows(
    problems: list[Problem], backend: ops.Backend, nodes: int
) -> Callable[[int], object]:
    """A call that replays one captured graph of `nodes` rows, on one problem after the other."""
    for problem in problems:
        problem.step(backend)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for i in range(nodes):
            problems[i % len(problems)].step(backend)
    return lambda _: graph.replay()


def graph_times(problems: list[Problem], backend: ops.Backend, nodes: int = 200) -> list[float]:
    """Microseconds per row inside one captured graph of `nodes` rows."""
    return [t / nodes for t in time_each(capture_rows(problems, backend, nodes), 20, 3)]


@contextlib.contextmanager
def ring_slots(kind: str) -> Iterator[None]:
    """The CUDA kernel's way of reading the ring: "early", "late", or "" as it chooses."""
    before = libraries.early_slots_limit({"early": 1 << 62, "late": 0}[kind]) if kind else None
    try:
        yield
    finally:
        if before is not None:
            libraries.early_slots_limit(before)


def ways(
    name: str, problems: list[Problem], warm: bool, slots: Sequence[str]
) -> Iterator[tuple[str, list[float]]]:
    """(label, microseconds) of one backend: in a graph, cold and warm, then launched one by one."""
    backend = ops.select(name, "cuda")
    for kind in slots if name != "eager" else ():
        with ring_slots(kind):
            check_device(backend, problems[0])
            for used in (problems, problems[:1]) if warm else (problems,):
                label = f"{name} in a graph" + (f", {kind}" if kind else "")
                label += "" if used is problems else ", warm"
                yield label, graph_times(used, backend, max(200, len(used)))
    yield name, time_each(lambda i: problems[i % len(problems)].step(backend))


def measure(shape: Sequence[int], dtype: torch.dtype, depth: int, bandwidth: float) -> list[Timing]:
    """Every CUDA backend on one shape."""
    cache = torch.cuda.get_device_properties(0).L2_cache_size
    nbytes = row_bytes(shape, dtype.itemsize, depth - 1)
    count = buffers_needed(nbytes, cache)
    problems = [Problem.make(shape, dtype, depth, "cuda") for _ in range(count)]
    key, results = str(dtype).removeprefix("torch."), []
    for name in ops.available("cuda"):
        slots = ("", "early", "late") if name == "cuda" and depth > 1 else ("",)
        for label, times in ways(name, problems, nbytes <= WARM_BYTES, slots):
            p20, p50, p80 = quantiles(times)
            share = nbytes / (1e-6 * p50) / bandwidth
            results.append(Timing(label, tuple(shape), key, depth, p20, p50, p80, nbytes, share))
    return results


def no_gpu(program: str) -> bool:
    """Whether there is no GPU; says so."""
    if torch.cuda.is_available():
        return False
    print(f"{program}: needs an NVIDIA GPU, torch {torch.__version__} sees none", file=sys.stderr)
    return True


def bench_device(argv: list[str] | None = None) -> int:
    """Command line. Status 2 without a GPU."""
    parser = argparse.ArgumentParser(prog="dlms bench device", description="One row on a GPU.")
    parser.add_argument("--depth", type=int, default=3, help="history slots")
    json_options(parser)
    args = parser.parse_args(argv)
    if no_gpu(parser.prog):
        return 2
    bandwidth = copy_bandwidth()
    report: dict[str, Any] = {"benchmark": "device", "machine": machine()}
    report |= {"copy_bytes_per_s": bandwidth, "rows": []}

    def measure_case(case: tuple[tuple[int, ...], str]) -> None:
        shape, dtype = case
        results = measure(shape, _DTYPES[dtype], args.depth, bandwidth)
        torch.cuda.empty_cache()
        report["rows"] += [asdict(r) for r in results]
        save_report(report, args)
        if not args.json:
            _show(results)

    say_not_measured(report, measure_within(args.seconds, _CASES, measure_case), args)
    if not finish_report(report, args):
        print(f"copy {bandwidth / 1e12:.2f} TB/s on {report['machine']['gpu']}")
    return int(not report["rows"])


def _show(results: Sequence[Timing]) -> None:
    for r in results:
        size = "x".join(map(str, r.shape))
        print(
            f"{size:>14} {r.network_dtype:>8} {r.name:<28} "
            f"p20 {r.p20_us:8.2f}  p50 {r.p50_us:8.2f}  p80 {r.p80_us:8.2f} us  "
            f"{100 * r.fraction_of_copy:5.1f} % of copy",
            flush=True,
        )


if __name__ == "__main__":
    sys.exit(bench_device())
