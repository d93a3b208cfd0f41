"""Time grids: float64 ``[steps + 1]``, strictly decreasing, both ends exactly t_max and t_min.

``steps`` counts solver steps, one less than the number of times. Every maker takes optional
``t_max`` and ``t_min`` in the process's own time (defaults: the process's range).
"""

from __future__ import annotations

import functools
import math
import numbers
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..support.values import is_finite_number
from . import EDM, VP, Process, RectifiedFlow, VPDiscrete, as_float64


def polynomial(
    process: Process,
    steps: int,
    rho: float = 7.0,
    *,
    t_max: float | None = None,
    t_min: float | None = None,
) -> Tensor:
    """Uniform in (sigma / alpha)^(1/rho) (Karras et al. 2022, eq. 5).

    Where sigma / alpha is infinite (a flow's t = 1) the same rule is applied to t itself.
    """
    high, low, s = _setup(process, steps, t_max, t_min)
    _check_rho(rho)
    if float(process.alpha(high)) == 0.0:
        return _pinned(_power(s, high, low, rho), high, low)
    r_max, r_min = (float(process.sigma_over_alpha(t)) for t in (high, low))
    return _pinned(process.inverse_sigma(_power(s, r_max, r_min, rho)), high, low)


def logsnr(
    process: Process, steps: int, *, t_max: float | None = None, t_min: float | None = None
) -> Tensor:
    """Uniform in lambda_ (Lu et al. 2022a, section 3.4).

    Raises:
        ValueError: lambda_ is infinite at an end (flows, or an end at sigma = 0).
    """
    high, low, s = _setup(process, steps, t_max, t_min)
    first, last = float(process.lambda_(high)), float(process.lambda_(low))
    if not (math.isfinite(first) and math.isfinite(last)):
        raise ValueError(
            f"logsnr grid: lambda_ is {first} at t = {high} and {last} at t = {low}, expected "
            "finite values; pass t_max and t_min inside the range or use time_uniform"
        )
    return _pinned(process.inverse_lambda(first + s * (last - first)), high, low)


def time_uniform(
    process: Process,
    steps: int,
    rho: float = 1.0,
    *,
    t_max: float | None = None,
    t_min: float | None = None,
) -> Tensor:
    """Uniform in time^(1/rho): rho = 1 "time uniform", rho = 2 "time quadratic".

    Time is the process's own, except for EDM, whose sigma is first given a VP time by the line
    fitted to the range (``VP.fitted``), running from 1 to 1e-3.
    """
    high, low, s = _setup(process, steps, t_max, t_min)
    _check_rho(rho)
    if isinstance(process, EDM):
        line = VP.fitted(low, high)
        times = line.sigma_over_alpha(_power(s, line.t_max, line.t_min, rho))
    else:
        times = _power(s, high, low, rho)
    return _pinned(times, high, low)


def discrete(
    process: Process,
    steps: int,
    rho: float = 1.0,
    *,
    t_max: float | None = None,
    t_min: float | None = None,
) -> Tensor:
    """Uniform in (level index / N)^(1/rho) of a ``VPDiscrete`` model; indices may be fractional."""
    if not isinstance(process, VPDiscrete):
        raise ValueError(
            f"discrete grid: process is {type(process).__name__}, expected VPDiscrete; "
            "use time_uniform"
        )
    return time_uniform(process, steps, rho, t_max=t_max, t_min=t_min)


def shifted(
    process: Process,
    steps: int,
    shift: float = 3.0,
    *,
    t_max: float | None = None,
    t_min: float | None = None,
) -> Tensor:
    """Uniform flow times moved towards noise, t = shift u / (1 + (shift - 1) u).

    Esser et al. 2024, eq. 23; shift = 1 is uniform.
    """
    if not isinstance(process, RectifiedFlow):
        raise ValueError(f"shifted grid: process is {type(process).__name__}, expected a flow")
    if not (is_finite_number(shift) and shift > 0):
        raise ValueError(f"shift is {shift!r}, expected a finite number > 0")
    high, low, s = _setup(process, steps, t_max, t_min)
    first, last = (t / (shift - (shift - 1) * t) for t in (high, low))
    u = first + s * (last - first)
    return _pinned(shift * u / (1 + (shift - 1) * u), high, low)


def from_times(process: Process, times: Tensor | Sequence[float]) -> Tensor:
    """Checks explicit times (at least two, finite, strictly decreasing, sigma defined)."""
    grid = as_float64(times)
    if grid.ndim != 1:
        raise ValueError(f"times have shape {tuple(grid.shape)}, expected [steps + 1]")
    return check_grid(process, grid)


def check_grid(process: Process, grid: Tensor) -> Tensor:
    """``grid`` ``[..., steps + 1]`` as float64 if it is a legal time grid of ``process``.

    Raises:
        ValueError: fewer than two times, not finite, not strictly decreasing, or outside the
            times the process knows (alpha and sigma must be defined and not negative).
    """
    if not isinstance(grid, Tensor) or not grid.is_floating_point():
        raise ValueError(f"grid is {type(grid).__name__}, expected a floating-point tensor")
    grid = grid.to(torch.float64)
    if grid.ndim < 1 or grid.shape[-1] < 2:
        raise ValueError(
            f"grid has shape {tuple(grid.shape)}, expected [..., steps + 1] >= 2 times"
        )
    values = grid.detach()
    if not bool(values.isfinite().all()) or not bool((values.diff(dim=-1) < 0).all()):
        raise ValueError(f"grid is {values.tolist()}, expected finite, strictly decreasing times")
    alpha, sigma = process.alpha(values), process.sigma(values)
    defined = (alpha >= 0) & (sigma >= 0) & alpha.isfinite() & sigma.isfinite()
    if not bool((defined & (values >= 0)).all()):
        raise ValueError(
            f"grid is {values.tolist()}, outside the times of {process!r}: alpha and sigma must be "
            "defined and not negative"
        )
    return grid


def _setup(
    process: Process, steps: int, t_max: float | None, t_min: float | None
) -> tuple[float, float, Tensor]:
    steps = integer("steps", steps, 1)
    high = process.t_max if t_max is None else float(t_max)
    low = process.t_min if t_min is None else float(t_min)
    if not 0 <= low < high < math.inf:
        raise ValueError(f"t_min is {low}, t_max is {high}, expected finite 0 <= t_min < t_max")
    if not (float(process.alpha(high)) >= 0 and float(process.sigma(high)) >= 0):
        raise ValueError(f"t_max is {high}, beyond the times of {process!r}")
    return high, low, torch.arange(steps + 1, dtype=torch.float64, device="cpu") / steps


def integer(name: str, value: Any, low: int, high: float = math.inf) -> int:
    """``value``, an integer of Python or NumPy in ``low`` .. ``high``, as an int.

    Raises:
        ValueError: anything else; names the value.
    """
    whole = isinstance(value, numbers.Integral) and not isinstance(value, bool)
    if not whole or not low <= int(value) <= high:
        wanted = f"an integer >= {low}" if high == math.inf else f"an integer in {low}..{high}"
        raise ValueError(f"{name} is {value!r}, expected {wanted}")
    return int(value)


def _check_rho(rho: float) -> None:
    if not (is_finite_number(rho) and rho > 0):
        raise ValueError(f"rho is {rho!r}, expected a finite number > 0")


def _power(s: Tensor, high: float, low: float, rho: float) -> Tensor:
    # both ends take the 1/rho power: a segment that starts below t_max stays in its range
    first, last = high ** (1 / rho), low ** (1 / rho)
    times: Tensor = (first + s * (last - first)) ** rho
    return times


def _pinned(times: Tensor, high: float, low: float) -> Tensor:
    times = times.clone()
    times[0], times[-1] = high, low
    if not bool((times.diff() < 0).all()):
        raise ValueError(f"grid is {times.tolist()}: too many steps to stay strictly decreasing")
    return times


GRIDS: dict[str, Callable[..., Tensor]] = {
    "polynomial": polynomial,
    "logsnr": logsnr,
    "time_uniform": time_uniform,
    "time_quadratic": functools.partial(time_uniform, rho=2.0),
    "discrete": discrete,
    "shifted": shifted,
}
"""name -> maker ``(process, steps)``: the only place where grids have names."""


def default_grid(process: Process) -> str:
    """Where no grid is named: uniform times for a process that starts without any data (a flow), the
    polynomial grid, which puts most of its times at low noise, for the others.
    """
    return "time_uniform" if float(process.alpha(process.t_max)) == 0.0 else "polynomial"


def named_grid(process: Process, name: str, steps: int) -> Tensor:
    """The grid called ``name``.

    Raises:
        ValueError: unknown name, or a grid that ``process`` does not have.
    """
    if name not in GRIDS:
        raise ValueError(f"grid is {name!r}, expected one of {', '.join(GRIDS)}")
    grid: Tensor = GRIDS[name](process, steps)
    return grid
