"""CUDA micro-benchmark of one row, and what both CUDA benchmarks share: timing and roofline.

    python -m dlms_engine.lab.bench.device --json row.json

Every backend is checked against the eager reference before it is timed. Times are CUDA events over
many launches with a cold L2: buffers rotate through more memory than the cache holds. In-graph
times are those of one node of a captured graph of many rows.
"""

from __future__ import annotations

import argparse
import math
import platform
import statistics
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from importlib import metadata
from typing import Any

import torch
from torch import Tensor

from dlms_engine import ops
from dlms_engine.lab.bench.timing import commit, finish, json_options
from dlms_engine.ops import layout, reference

SHAPES = ((1, 4, 64, 64), (64, 3, 32, 32), (64, 3, 256, 256))
LATENT = (16, 16, 128, 128)  # timed with a bfloat16 network
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


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


def time_each(run: Callable[[int], object], repeats: int = 20, inner: int = 50) -> list[float]:
    """Microseconds of one call: `repeats` measurements of `inner` calls between two CUDA events."""
    for i in range(inner):
        run(i)
    torch.cuda.synchronize()
    times, turn = [], 0
    for _ in range(repeats):
        start = torch.cuda.Event(enable_timing=True)
        end = torch.cuda.Event(enable_timing=True)
        start.record()
        for _ in range(inner):
            run(turn)
            turn += 1
        end.record()
        end.synchronize()
        times.append(1e3 * start.elapsed_time(end) / inner)
    return times


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
    turns = [0] * len(runs)
    for _ in range(rounds):
        for k, run in enumerate(runs):
            start = torch.cuda.Event(enable_timing=True)
            end = torch.cuda.Event(enable_timing=True)
            start.record()
            for _ in range(inner[k]):
                run(turns[k])
                turns[k] += 1
            end.record()
            end.synchronize()
            times[k].append(1e3 * start.elapsed_time(end) / inner[k])
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


def check(backend: ops.Backend, problem: Problem) -> None:
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


def measure(shape: Sequence[int], dtype: torch.dtype, depth: int, bandwidth: float) -> list[Timing]:
    """Every CUDA backend on one shape, launched one by one and inside a graph."""
    cache = torch.cuda.get_device_properties(0).L2_cache_size
    nbytes = row_bytes(shape, dtype.itemsize, depth - 1)
    problems = [
        Problem.make(shape, dtype, depth, "cuda") for _ in range(buffers_needed(nbytes, cache))
    ]
    results = []
    for name in ops.available("cuda"):
        backend = ops.select(name, "cuda")
        if name != "eager":
            check(backend, problems[0])

        def launch(i: int, backend: ops.Backend = backend) -> None:
            problems[i % len(problems)].step(backend)

        timed = {name: time_each(launch)}
        if name != "eager":
            timed[f"{name} in a graph"] = graph_times(problems, backend)
        for label, times in timed.items():
            p20, p50, p80 = quantiles(times)
            share = nbytes / (1e-6 * p50) / bandwidth
            key = str(dtype).removeprefix("torch.")
            results.append(Timing(label, tuple(shape), key, depth, p20, p50, p80, nbytes, share))
    return results


def machine() -> dict[str, Any]:
    """What a figure must be quoted with."""
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        driver = subprocess.run(query, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        driver = "unknown"
    return {
        "gpu": torch.cuda.get_device_name(0),
        "driver": driver,
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "triton": _version("triton"),
        "diffusers": _version("diffusers"),
        "commit": commit(),
        "python": platform.python_version(),
        "backends": ops.available("cuda"),
    }


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def no_gpu(program: str) -> bool:
    """Whether there is no GPU; says so."""
    if torch.cuda.is_available():
        return False
    print(f"{program}: needs an NVIDIA GPU, torch {torch.__version__} sees none", file=sys.stderr)
    return True


def main(argv: list[str] | None = None) -> int:
    """Command line. Status 2 without a GPU."""
    parser = argparse.ArgumentParser(prog="dlms bench device", description="One row on a GPU.")
    parser.add_argument("--depth", type=int, default=3, help="history slots")
    json_options(parser)
    args = parser.parse_args(argv)
    if no_gpu(parser.prog):
        return 2
    bandwidth = copy_bandwidth()
    results: list[Timing] = []
    for shape in SHAPES:
        results += measure(shape, torch.float32, args.depth, bandwidth)
    results += measure(LATENT, torch.bfloat16, args.depth, bandwidth)
    here = machine()
    report = {
        "benchmark": "device",
        "machine": here,
        "copy_bytes_per_s": bandwidth,
        "rows": [asdict(r) for r in results],
    }
    if finish(report, args):
        return 0
    print(f"copy {bandwidth / 1e12:.2f} TB/s on {here['gpu']}")
    for r in results:
        size = "x".join(map(str, r.shape))
        print(
            f"{size:>14} {r.network_dtype:>8} {r.name:<18} p20 {r.p20_us:8.2f}  p50 "
            f"{r.p50_us:8.2f}  p80 {r.p80_us:8.2f} us  {100 * r.fraction_of_copy:5.1f} % of copy"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
