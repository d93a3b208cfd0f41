"""The times one run follows: diffusers' own grids, as process times."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...processes import VPDiscrete
from .noise import NoiseModel

Config = Mapping[str, Any]
MODIFIERS = ("karras_sigmas", "exponential_sigmas", "beta_sigmas", "lu_lambdas")


class Times(NamedTuple):
    """A strictly decreasing grid, and how many evaluations at its end change nothing."""

    grid: Tensor  # [steps + 1] float64 process times
    padding: int  # a config may ask for a last step of length zero: it is an identity row


def run_times(
    config: Config,
    model: NoiseModel,
    solver: str,
    steps: int | None,
    timesteps: Sequence[float] | Tensor | None = None,
    sigmas: Sequence[float] | Tensor | None = None,
    mu: float | None = None,
) -> Times:
    """The grid of ``steps`` evaluations, or the custom one.

    Args:
        solver: DDIM and DEIS have rules of their own for "leading" spacing and for the end.
        timesteps: custom network times, final (no shift is applied to them).
        sigmas: custom noise levels, N values or N + 1 with the final 0; flow: before the shift.
        mu: dynamic shift of flow models.

    Raises:
        ValueError: contradicting or missing arguments, times that do not decrease.
    """
    if timesteps is not None and sigmas is not None:
        raise ValueError("timesteps and sigmas were both given: pass one of them")
    if steps is None and timesteps is None and sigmas is None:
        raise ValueError("pass num_inference_steps, timesteps or sigmas")
    given = timesteps if timesteps is not None else sigmas
    if given is None and (isinstance(steps, bool) or not isinstance(steps, int) or steps < 1):
        raise ValueError(f"num_inference_steps is {steps!r}, expected an integer >= 1")
    end = _end(config, model, solver)
    if timesteps is not None:
        return _finish(model, model.time(_vector(timesteps, "timesteps")), end)
    custom = None if sigmas is None else _vector(sigmas, "sigmas")
    if custom is not None and len(custom) > 1 and float(custom[-1]) == 0:
        custom = custom[:-1]
    if model.kind == "flow":
        return _finish(model, _flow_times(config, steps, custom, mu), 0.0)
    if custom is not None:
        return _finish(model, model.process.inverse_sigma(custom), end)
    assert steps is not None
    if model.kind == "edm":
        return _finish(model, _edm_times(config, model, steps), end)
    return _finish(model, _vp_times(config, model, solver, steps), end)


def _vector(values: Sequence[float] | Tensor, name: str) -> Tensor:
    vector = torch.as_tensor(values, dtype=torch.float64).detach().cpu()
    if vector.ndim != 1 or not len(vector):
        raise ValueError(f"{name} have shape {tuple(vector.shape)}, expected a list of numbers")
    return vector


def _end(config: Config, model: NoiseModel, solver: str) -> float:
    """Process time of the finished sample: 0, or that of the smallest training level."""
    kind = config.get("final_sigmas_type") or "zero"
    if kind not in ("zero", "sigma_min"):
        raise ValueError(f"final_sigmas_type is {kind!r}, expected 'zero' or 'sigma_min'")
    # DEIS has no choice in diffusers; DDIM's is called set_alpha_to_one
    if solver == "deis" or (solver == "ddim" and not config.get("set_alpha_to_one", True)):
        kind = "sigma_min"
    return 0.0 if kind == "zero" or model.kind == "flow" else model.process.t_min


def _finish(model: NoiseModel, times: Tensor, end: float) -> Times:
    asked = len(times)
    inside = times[times > end * (1 + 1e-9)]
    grid = torch.cat([inside, torch.tensor([end], dtype=torch.float64)])
    if len(inside) < asked - 1 or not len(inside) or not bool((grid.diff() < 0).all()):
        raise ValueError(
            f"timesteps are {model.timestep(times).tolist()}, expected strictly decreasing values "
            f"above that of the end, {float(model.timestep(grid[-1:])):.6g}"
        )
    return Times(grid, asked - len(inside))


# -- variance preserving ------------------------------------------------------------------------


def _vp_times(config: Config, model: NoiseModel, solver: str, steps: int) -> Tensor:
    process = model.process
    assert isinstance(process, VPDiscrete)
    modifier = _modifier(config)
    if modifier is None:
        return model.time(_indices(config, process, solver, steps))
    ends = torch.tensor([1.0, 1 / process.levels], dtype=torch.float64)
    high, low = process.sigma_over_alpha(ends).tolist()
    return process.inverse_sigma(spread(modifier, high, low, steps, config))


def _modifier(config: Config) -> str | None:
    found = [name for name in MODIFIERS if config.get(f"use_{name}")]
    if len(found) > 1:
        raise ValueError(f"use_{found[0]} and use_{found[1]} are both set: only one can be used")
    return found[0] if found else None


def _indices(config: Config, process: VPDiscrete, solver: str, steps: int) -> Tensor:
    """Training indices by ``timestep_spacing`` (Lin et al. 2024, Table 2); whole if they can be."""
    levels, spacing = process.levels, config["timestep_spacing"]
    last = levels - _clipped(config, process)
    offset = int(config.get("steps_offset") or 0)
    count = torch.arange(steps, dtype=torch.float64)
    if spacing == "linspace":
        found = (steps - count) * ((last - 1) / steps)
    elif spacing == "leading":
        parts = steps if solver == "ddim" else steps + 1
        ratio = last // parts or last / parts
        found = (parts - 1 - count) * ratio + offset
    elif spacing == "trailing":
        # rounded before the subtraction: halves go to even
        found = last - count * (levels / steps)
        found = found.round() - 1 if bool((found.round().diff() < 0).all()) else found - 1
    else:
        raise ValueError(
            f"timestep_spacing is {spacing!r}, expected 'linspace', 'leading' or 'trailing'"
        )
    whole = found.round()
    return whole if bool((whole.diff() < 0).all()) else found


def _clipped(config: Config, process: VPDiscrete) -> int:
    """Levels dropped at the noisy end (needed by cosine schedules)."""
    lowest = config.get("lambda_min_clipped")
    if lowest is None or lowest == -math.inf:
        return 0
    t = torch.arange(1, process.levels + 1, dtype=torch.float64) / process.levels
    return int((process.lambda_(t) < lowest).sum())


def spread(kind: str, high: float, low: float, steps: int, config: Config) -> Tensor:
    """``steps`` noise levels from ``high`` to ``low``, both included (one step: ``high``)."""
    s = torch.arange(steps, dtype=torch.float64) / max(steps - 1, 1)
    if kind == "karras_sigmas":
        rho = float(config.get("rho") or 7.0)
        first, last = high ** (1 / rho), low ** (1 / rho)
        return (first + s * (last - first)) ** rho
    if kind in ("exponential_sigmas", "lu_lambdas"):  # rho = 1 in lambda is the same
        return torch.exp(math.log(high) + s * (math.log(low) - math.log(high)))
    try:
        from scipy.stats import beta
    except ImportError as exc:
        raise ImportError("use_beta_sigmas needs scipy: pip install scipy") from exc
    quantiles: Tensor = torch.as_tensor(beta.ppf((1 - s).numpy(), 0.6, 0.6))
    return low + quantiles * (high - low)


# -- EDM and flows ------------------------------------------------------------------------------


def _edm_times(config: Config, model: NoiseModel, steps: int) -> Tensor:
    kind = f"{config.get('sigma_schedule') or 'karras'}_sigmas"
    return spread(kind, model.process.t_max, model.process.t_min, steps, config)


def _flow_times(
    config: Config, steps: int | None, custom: Tensor | None, mu: float | None
) -> Tensor:
    if config.get("invert_sigmas"):
        raise ValueError("invert_sigmas is not supported: the times would increase")
    dynamic = bool(config.get("use_dynamic_shifting"))
    if dynamic and mu is None:
        raise ValueError("use_dynamic_shifting is set: set_timesteps needs mu")
    shift = static_shift(config)
    if custom is None:
        assert steps is not None
        lowest = 1.0 / int(config["num_train_timesteps"])
        if not dynamic:  # the smallest training level is a shifted one
            lowest = shift * lowest / (1 + (shift - 1) * lowest)
        s = torch.arange(steps, dtype=torch.float64) / max(steps - 1, 1)
        custom = 1.0 + s * (lowest - 1.0)
    if dynamic:
        assert mu is not None
        sigmas = _dynamic(str(config.get("time_shift_type") or "exponential"), mu, custom)
    else:
        sigmas = shift * custom / (1 + (shift - 1) * custom)
    if config.get("shift_terminal") and float(sigmas[-1]) < 1:
        rest = 1 - sigmas
        sigmas = 1 - rest * ((1 - float(config["shift_terminal"])) / rest[-1])
    modifier = _modifier(config)
    if modifier is not None:
        sigmas = spread(modifier, float(sigmas[0]), float(sigmas[-1]), len(sigmas), config)
    return sigmas


def static_shift(config: Config) -> float:
    """``shift`` (FlowMatch classes) or ``flow_shift`` (multistep classes), 1 without either."""
    values = {float(v) for k in ("shift", "flow_shift") if (v := config.get(k)) is not None}
    if len(values) > 1:
        raise ValueError(f"shift and flow_shift are both set and differ: {sorted(values)}")
    return values.pop() if values else 1.0


def _dynamic(kind: str, mu: float, sigmas: Tensor) -> Tensor:
    if kind not in ("exponential", "linear"):
        raise ValueError(f"time_shift_type is {kind!r}, expected 'exponential' or 'linear'")
    strength = math.exp(mu) if kind == "exponential" else mu
    # 1 at sigma = 1 exactly: strength / (strength + 0)
    return strength / (strength + (1 / sigmas - 1))
