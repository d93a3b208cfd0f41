"""Stage: what a captured run costs above its evaluations, and as a loop or unrolled.

A table's run is one graph, either of all evaluations (unrolled) or of one under a WHILE node (loop),
which serves any number of them. "auto" takes the loop unless unrolled is more than 2 % faster.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import checks
import models
import torch

from dlms_engine import Sampler, grids, seeded_noise, solvers
from dlms_engine.engine.cuda_graph_cache import LoopMode
from dlms_engine.engine.sampler import GRAPHS
from dlms_engine.lab.bench.loop import bare_forwards, interleaved_walls

REPEATS = 30


def host_seconds(run: Callable[[], object], device: str) -> float:
    """Seconds until the call returns, by the median; the device may still be at work."""
    times = []
    for _ in range(REPEATS):
        checks.synchronize(device)
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def sampler_of(device: str, model: str, nfe: int) -> tuple[Sampler, torch.Tensor]:
    denoiser, _, shape = models.load(model, device)
    table = solvers.ipndm(denoiser.process, grids.polynomial(denoiser.process, nfe))
    noise = seeded_noise(range(1), shape, denoiser.process.t_max, device=device)
    return Sampler(denoiser, table), noise


def overhead(device: str, model: str) -> dict[str, Any]:
    """A run of 5 evaluations beside the captured evaluations alone, both until the device is done."""
    sampler, noise = sampler_of(device, model, 5)
    GRAPHS.clear()
    sampler(noise)
    ways = [lambda: sampler(noise), bare_forwards(sampler.denoiser.network, noise, 5)]
    run, bare = (1e3 * statistics.median(each) for each in interleaved_walls(ways, device, REPEATS))
    return {
        "run_us": run,
        "bare_us": bare,
        "above_bare_us": run - bare,
        "above_bare_share": run / bare - 1,
        "host_us": 1e6 * host_seconds(ways[0], device),
        "captured": len(GRAPHS) > 0,
        "limit": "2 % or 30 us above the bare evaluations",
    }


def loop_or_unrolled(device: str, model: str, nfe: int) -> dict[str, Any]:
    """Microseconds of a run each way, and which one is chosen."""
    sampler, noise = sampler_of(device, model, nfe)
    before = GRAPHS.loop
    found: dict[str, Any] = {}
    modes: tuple[tuple[str, LoopMode], ...] = (
        ("unrolled", "never"), ("loop", "always"), ("chosen", "auto"),
    )  # fmt: skip
    try:
        for name, mode in modes:
            GRAPHS.clear()
            GRAPHS.loop = mode
            start = time.perf_counter()
            sampler(noise)
            checks.synchronize(device)
            found[f"{name}_capture_ms"] = 1e3 * (time.perf_counter() - start)
            (times,) = interleaved_walls([lambda: sampler(noise)], device, REPEATS)
            found[f"{name}_us"] = 1e3 * statistics.median(times)
            found[f"{name}_captured"] = len(GRAPHS) > 0
    finally:
        GRAPHS.loop = before
        GRAPHS.clear()
    if found["chosen_captured"]:
        best = min(found["loop_us"], found["unrolled_us"])
        if found["chosen_us"] > 1.1 * best:
            raise AssertionError(
                f"the chosen way takes {found['chosen_us']:.0f} us, the better one {best:.0f} us"
            )
    return found


def main() -> int:
    parser = checks.options(__doc__ or "")
    parser.add_argument("--model", default="embedded", help="embedded or tiny")
    args = parser.parse_args()
    torch.set_num_threads(1)
    run = checks.Checks("captured", args.output, args.seconds, device=args.device)
    run.run("overhead of 5 evaluations", lambda: overhead(args.device, args.model))
    for nfe in (5, 20):
        run.run(
            f"loop or unrolled, {nfe} evaluations",
            lambda: loop_or_unrolled(args.device, args.model, nfe),  # noqa: B023
        )
    return run.status()


if __name__ == "__main__":
    sys.exit(main())
