"""Where a network's outputs are not finite, for the error that says so."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ...processes import Process
from ...support.transfer import to_host
from ...support.values import require_finite
from .problem import SamplingProblem

_TIMES = 64
"""Of each of two grids, uniform in time and in the log level."""


def require_finite_solution(problem: SamplingProblem, value: float, what: str) -> None:
    """``value``, a measured error called ``what``, is finite.

    Raises:
        FloatingPointError: it is not; names the times at which the network's outputs are not finite, if
            it finds some: a solver of few evaluations may pass them by.
    """
    if math.isfinite(value):
        return
    bad, tried = _times_not_finite(problem)
    if not bad:
        require_finite(value, what)
    first, last = max(bad), min(bad)
    raise FloatingPointError(
        f"{what} is {value}: the network's outputs are not finite at {len(bad)} of {tried} times tried, "
        f"from t = {first:.4g} to t = {last:.4g} (sigma / alpha {_ratio(problem, first):.4g} to "
        f"{_ratio(problem, last):.4g}): look at its dtype, its prediction type and the ends of the "
        "time range"
    )


def _ratio(problem: SamplingProblem, t: float) -> float:
    return float(problem.process.sigma_over_alpha(t))


def log_level_times(process: Process, count: int) -> Tensor:
    """float64 ``[count]``, falling: uniform in the logarithm of sigma / alpha, whose ends may be 0 and
    infinite and are cut to 1e-5 and 1e5.
    """
    low, high = (float(process.sigma_over_alpha(t)) for t in (process.t_min, process.t_max))
    ends = math.log(min(high, 1e5)), math.log(max(low, 1e-5))
    levels = torch.linspace(*ends, count, dtype=torch.float64, device="cpu").exp()
    return process.inverse_sigma(levels).clamp(process.t_min, process.t_max)


@torch.no_grad()
def _times_not_finite(problem: SamplingProblem) -> tuple[list[float], int]:
    """Times that give outputs that are not finite on noise of their level, and how many were tried."""
    process, numbers = problem.process, range(1)
    uniform = torch.linspace(
        process.t_min, process.t_max, _TIMES, dtype=torch.float64, device="cpu"
    )
    times = torch.cat([log_level_times(process, _TIMES), uniform]).unique()
    noise = problem.noise(numbers) / float(process.sigma(process.t_max))
    finite = [
        problem.predict(float(process.sigma(t)) * noise, t, numbers).isfinite().all() for t in times
    ]
    right = to_host(torch.stack(finite)).tolist()
    return [t for t, fine in zip(times.tolist(), right, strict=True) if not fine], len(times)
