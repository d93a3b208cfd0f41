"""Microseconds of one scheduler step, the engine against diffusers, on this machine.

    python examples/integrations/time_scheduler_step.py [--shape 1 4 64 64] [--threads 1]

One steady-state step (indices 12 to 15 of 20, full history); the median of many, in turns, because
the machine may be busy.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Sequence
from typing import Any

import diffusers
import torch

from dlms_engine import ops
from dlms_engine.integrations.diffusers import DLMSScheduler

TIMED = range(12, 16)
CASES = [
    ("ddim", diffusers.DDIMScheduler, {"clip_sample": False}),
    ("dpm_solver_pp", diffusers.DPMSolverMultistepScheduler, {}),
    ("unipc", diffusers.UniPCMultistepScheduler, {}),
    ("deis", diffusers.DEISMultistepScheduler, {}),
]


def microseconds(scheduler: Any, output: torch.Tensor, x: torch.Tensor, runs: int) -> float:
    """Median over the timed steps of ``runs`` runs from the latents ``x``."""
    times = []
    for _ in range(runs):
        scheduler.set_timesteps(20)
        latents = x
        for index, t in enumerate(scheduler.timesteps[: TIMED.stop]):
            start = time.perf_counter()
            latents = scheduler.step(output, t, latents, return_dict=False)[0]
            if index in TIMED:
                times.append(1e6 * (time.perf_counter() - start))
    return statistics.median(times)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", type=int, nargs="+", default=[1, 4, 64, 64])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=7)
    arguments = parser.parse_args(argv)
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    x, output = torch.randn(arguments.shape), torch.randn(arguments.shape)
    print(
        f"shape {arguments.shape}, {arguments.threads} thread(s), backends {ops.available('cpu')}"
    )
    with torch.no_grad():
        for solver, cls, options in CASES:
            theirs = cls(**options)
            ours = DLMSScheduler.from_config(theirs.config, solver=solver)
            rounds = [
                [microseconds(scheduler, output, x, 15) for scheduler in (theirs, ours)]
                for _ in range(arguments.rounds)
            ]
            best = [min(column) for column in zip(*rounds, strict=True)]
            print(
                f"{solver:14s} diffusers {best[0]:7.1f}   engine {best[1]:7.1f} us   "
                f"x{best[0] / best[1]:.1f}"
            )


if __name__ == "__main__":
    main()
