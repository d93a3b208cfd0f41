"""The times one run follows: diffusers' own grids, as process times."""

from __future__ import annotations

import functools
import importlib.metadata
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...processes import VPDiscrete
from .flow_times import flow_times
from .noise import NoiseModel
from .spread import modifier_of, spread

_Config = Mapping[str, Any]
TINY = 1e-10  # relative length of a last step that a config asks to be of length zero
NEAR = 1e-6  # relative distance of a last time to the end within which float32 sigmas mean the end


@dataclass(frozen=True)
class Times:
    """A strictly decreasing grid.

    Attributes:
        grid: ``[steps + 1]`` float64 process times. A last step of length zero, which some configs
            ask for, is ``TINY``: its evaluation still counts, as a corrector's for instance.
        told: ``[steps]`` network times given by the caller; None for those of the grid.
        stride: DDIM steps from each time down by this many training levels, whatever the next time
            is (diffusers' rule); None steps to the next time.
    """

    grid: Tensor
    told: Tensor | None = None
    stride: int | None = None


def run_times(
    config: _Config,
    model: NoiseModel,
    solver: str,
    steps: int | None,
    timesteps: Sequence[float] | Tensor | None = None,
    sigmas: Sequence[float] | Tensor | None = None,
    mu: float | None = None,
) -> Times:
    """The grid of ``steps`` evaluations, or the custom one.

    Args:
        solver: DDIM and DEIS have rules of their own for the spacing and for the end.
        timesteps: custom network times. Flows follow ``FlowMatchEulerDiscreteScheduler``: without
            ``sigmas`` the shift applies to the noise levels made of them, never to the times; before
            diffusers 0.42 the times of flows are those of the shifted levels, whatever is given.
        sigmas: custom noise levels, N values or N + 1 with the final 0, or with the last one again
            (``final_sigmas_type="sigma_min"``); flow: before the shift.
        mu: dynamic shift of flow models.

    Raises:
        ValueError: contradicting or missing arguments, times that do not decrease.
    """
    told = None if timesteps is None else vector(timesteps, "timesteps")
    custom = None if sigmas is None else vector(sigmas, "sigmas")
    if custom is not None and len(custom) > 1 and float(custom[-1]) in (0.0, float(custom[-2])):
        custom = custom[:-1]
    if steps is None and told is None and custom is None:
        raise ValueError("pass num_inference_steps, timesteps or sigmas")
    if (
        told is not None
        and custom is not None
        and (model.kind != "flow" or len(told) != len(custom))
    ):
        raise ValueError(
            "timesteps and sigmas were both given: only flow models take both, and as many of each"
        )
    given = told if told is not None else custom
    if given is None and (isinstance(steps, bool) or not isinstance(steps, int) or steps < 1):
        raise ValueError(f"num_inference_steps is {steps!r}, expected an integer >= 1")
    if model.kind == "flow":
        if told is not None and custom is None:
            custom = told / model.levels
        grid, end = flow_times(config, steps, custom, mu)
        if config.get("invert_sigmas") or not _uses_given_times():
            told = None  # diffusers makes them of the levels again
        return _finish(model, grid, end, told)
    end_time = _end(config, model, solver)
    if told is not None:
        return _finish(model, model.time(told), end_time)
    if custom is not None:
        return _finish(model, model.process.inverse_sigma(custom), end_time)
    assert steps is not None
    if model.kind == "edm":
        return _finish(model, _edm_times(config, model, steps), end_time)
    return _vp_times(config, model, solver, steps, end_time)


@functools.cache
def _uses_given_times() -> bool:
    """Whether the installed diffusers calls a flow's network at the times that it is given."""
    try:
        numbers = importlib.metadata.version("diffusers").split(".")
    except importlib.metadata.PackageNotFoundError:
        return True
    return (int(numbers[0]), int(numbers[1])) >= (0, 42)


def vector(values: Sequence[float] | Tensor, name: str) -> Tensor:
    """``values`` as float64 ``[N]``, N >= 1."""
    made = torch.as_tensor(values, dtype=torch.float64).detach().cpu()
    if made.ndim != 1 or not len(made):
        raise ValueError(f"{name} have shape {tuple(made.shape)}, expected a list of numbers")
    return made


def _end(config: _Config, model: NoiseModel, solver: str) -> float:
    """Process time of the finished sample: 0, or that of the smallest training level."""
    kind = config.get("final_sigmas_type") or "zero"
    if kind not in ("zero", "sigma_min"):
        raise ValueError(f"final_sigmas_type is {kind!r}, expected 'zero' or 'sigma_min'")
    # DEIS has no choice in diffusers; DDIM's is called set_alpha_to_one
    if solver == "deis" or (solver == "ddim" and not config.get("set_alpha_to_one", True)):
        kind = "sigma_min"
    return 0.0 if kind == "zero" else model.process.t_min


def _finish(
    model: NoiseModel,
    times: Tensor,
    end: float,
    told: Tensor | None = None,
    stride: int | None = None,
) -> Times:
    """The grid of ``times`` and ``end``; a last time at the end makes a step of no length there."""
    last = float(times[-1])
    if len(times) and last > 0 and abs(last - end) <= NEAR * last:
        end = last * (1 - TINY)
    grid = torch.cat([times, torch.tensor([end], dtype=torch.float64)])
    if not bool((grid.diff() < 0).all()):
        values = [f"{t:.6g}" for t in model.timestep(times).tolist()]
        shown = ", ".join(values if len(values) < 12 else [*values[:4], "...", *values[-4:]])
        raise ValueError(
            f"timesteps are [{shown}], expected strictly decreasing values above that of the end, "
            f"{float(model.timestep(grid[-1:])):.6g}"
        )
    return Times(grid, told, stride)


# -- variance preserving and EDM ------------------------------------------------------------------


def _vp_times(config: _Config, model: NoiseModel, solver: str, steps: int, end: float) -> Times:
    process = model.process
    assert isinstance(process, VPDiscrete)
    modifier = modifier_of(config)
    if modifier is None:
        indices = _indices(config, process, solver, steps)
        stride = process.levels // steps if solver == "ddim" and steps <= process.levels else None
        return _finish(model, model.time(indices), end, stride=stride)
    ends = torch.tensor([1.0, 1 / process.levels], dtype=torch.float64)
    high, low = process.sigma_over_alpha(ends).tolist()
    high, low = config.get("sigma_max") or high, config.get("sigma_min") or low
    times = process.inverse_sigma(spread(modifier, float(high), float(low), steps, config))
    if end > 0 and solver in ("unipc", "deis"):  # they end at their own last level
        end = float(times[-1])
    return _finish(model, times, end)


def _indices(config: _Config, process: VPDiscrete, solver: str, steps: int) -> Tensor:
    """Training indices by ``timestep_spacing`` (Lin et al. 2024, Table 2); whole if they can be."""
    levels, spacing = process.levels, config["timestep_spacing"]
    last = levels - _clipped(config, process)
    offset = int(config.get("steps_offset") or 0)
    count = torch.arange(steps, dtype=torch.float64)
    if spacing == "linspace" and solver == "ddim":  # its last step is the one from level 0
        exact = torch.from_numpy(np.linspace(0, last - 1, steps)[::-1].copy())
    elif spacing == "linspace":
        exact = (steps - count) * ((last - 1) / steps)
    elif spacing == "leading":
        parts = steps if solver == "ddim" else steps + 1
        ratio = last // parts or last / parts
        exact = (parts - 1 - count) * ratio + offset
    elif spacing == "trailing":
        # rounded before the subtraction, halves to even, and added up as numpy.arange does
        exact = last + count * ((last - levels / steps) - last)
        exact = exact.round() - 1 if bool((exact.round().diff() < 0).all()) else exact - 1
    else:
        raise ValueError(
            f"timestep_spacing is {spacing!r}, expected 'linspace', 'leading' or 'trailing'"
        )
    whole = exact.round()
    return whole if bool((whole.diff() < 0).all()) else exact


def _clipped(config: _Config, process: VPDiscrete) -> int:
    """Levels dropped at the noisy end (needed by cosine schedules)."""
    lowest = config.get("lambda_min_clipped")
    if lowest is None or lowest == -math.inf:
        return 0
    t = torch.arange(1, process.levels + 1, dtype=torch.float64) / process.levels
    return int((process.lambda_(t) < lowest).sum())


def _edm_times(config: _Config, model: NoiseModel, steps: int) -> Tensor:
    kind = f"{config.get('sigma_schedule') or 'karras'}_sigmas"
    return spread(kind, model.process.t_max, model.process.t_min, steps, config)
