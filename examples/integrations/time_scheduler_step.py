"""Microseconds of one scheduler step, the engine against diffusers, on this machine.

    python examples/integrations/time_scheduler_step.py [--shape 1 4 64 64] [--threads 1]

One steady-state step (index 12 of 20, full history); the median of many, in turns, because the
machine may be busy.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time
from typing import Any

import diffusers
import torch

from dlms_engine import ops
from dlms_engine.integrations.diffusers import DLMSScheduler

CASES = [
    ("ddim", diffusers.DDIMScheduler, {"clip_sample": False}),
    ("dpm_solver_pp", diffusers.DPMSolverMultistepScheduler, {}),
    ("unipc", diffusers.UniPCMultistepScheduler, {}),
    ("deis", diffusers.DEISMultistepScheduler, {}),
]


def warmed(scheduler: Any, output: torch.Tensor, x: torch.Tensor) -> tuple[Any, Any, torch.Tensor]:
    """``scheduler`` after 12 of 20 steps, the next timestep, and its latents."""
    scheduler.set_timesteps(20)
    for t in scheduler.timesteps[:12]:
        x = scheduler.step(output, t, x, return_dict=False)[0]
    return scheduler, scheduler.timesteps[12], x


def microseconds(state: tuple[Any, Any, torch.Tensor], output: torch.Tensor, count: int) -> float:
    """Median over ``count`` steps, each on its own copy of the scheduler's bookkeeping."""
    scheduler, t, x = state
    held = dict(scheduler.__dict__)
    times = []
    for _ in range(count):
        start = time.perf_counter()
        scheduler.step(output, t, x, return_dict=False)
        times.append(1e6 * (time.perf_counter() - start))
        scheduler.__dict__.update({k: v for k, v in held.items() if k != "model_outputs"})
    return statistics.median(times)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", type=int, nargs="+", default=[1, 4, 64, 64])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=7)
    arguments = parser.parse_args()
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
            states = [warmed(copy.deepcopy(s), output, x) for s in (theirs, ours)]
            rounds = [
                [microseconds(state, output, 60) for state in states]
                for _ in range(arguments.rounds)
            ]
            best = [min(column) for column in zip(*rounds, strict=True)]
            print(
                f"{solver:14s} diffusers {best[0]:7.1f}   engine {best[1]:7.1f} us   "
                f"x{best[0] / best[1]:.1f}"
            )


if __name__ == "__main__":
    main()
