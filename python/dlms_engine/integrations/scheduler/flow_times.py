"""Flow-matching grids: the rules of diffusers' classes, each with its own shift and its own ends.

``flow_grid`` of a config names the class whose rule is followed: ``"flow_match"``
(FlowMatchEulerDiscreteScheduler), ``"unipc"``, ``"dpm_solver_pp"`` or ``"deis"`` (the multistep
classes with ``use_flow_sigmas``).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from .noise import make_alphas_cumprod, make_betas
from .spread import modifier_of, spread

_Config = Mapping[str, Any]
_GRIDS = ("flow_match", "unipc", "dpm_solver_pp", "deis")
BELOW_ONE = 1e-6  # UniPC keeps its first level this far below pure noise


def flow_times(
    config: _Config, steps: int | None, custom: Tensor | None, mu: float | None
) -> tuple[Tensor, float]:
    """``[steps]`` noise levels, equal to the process times, and that of the finished sample.

    Args:
        custom: noise levels before the shift; None makes those of ``steps``.
        mu: of the dynamic shift.

    Raises:
        ValueError: ``mu`` is missing, an unknown ``flow_grid`` or ``time_shift_type``.
    """
    grid = config.get("flow_grid") or "flow_match"
    if grid not in _GRIDS:
        raise ValueError(f"flow_grid is {grid!r}, expected one of {_GRIDS}")
    if config.get("use_dynamic_shifting") and mu is None and grid in ("flow_match", "unipc"):
        raise ValueError("use_dynamic_shifting is set: set_timesteps needs mu")
    if grid == "flow_match":
        return _flow_match(config, steps, custom, mu), 0.0
    if grid == "unipc":
        return _unipc(config, steps, custom, mu)
    shift = math.exp(mu) if mu is not None else static_shift(config)
    sigmas = _between(config, steps) if custom is None else custom
    sigmas = _shifted(sigmas, shift)
    # DEIS ends at its last level; DPM-Solver++ at 0, or at the smallest level of its betas
    last = float(sigmas[-1]) if grid == "deis" else _end(config, None)
    return sigmas, last


def is_default(sigmas: Tensor) -> bool:
    """Whether ``sigmas`` are linspace(1, 1 / N, N), FLUX pipelines' own."""
    count = len(sigmas)
    expected = torch.linspace(1.0, 1.0 / max(count, 1), count, dtype=torch.float64)
    return torch.allclose(sigmas, expected, atol=1e-6)


def static_shift(config: _Config) -> float:
    """``shift`` (FlowMatch classes) or ``flow_shift`` (multistep classes), 1 without either."""
    values = {float(v) for k in ("shift", "flow_shift") if (v := config.get(k)) is not None}
    if len(values) > 1:
        raise ValueError(f"shift and flow_shift are both set and differ: {sorted(values)}")
    return values.pop() if values else 1.0


def _flow_match(
    config: _Config, steps: int | None, custom: Tensor | None, mu: float | None
) -> Tensor:
    dynamic = bool(config.get("use_dynamic_shifting"))
    shift = static_shift(config)
    if custom is None:
        assert steps is not None
        lowest = 1.0 / int(config["num_train_timesteps"])
        if not dynamic:  # the smallest training level is a shifted one
            lowest = shift * lowest / (1 + (shift - 1) * lowest)
        s = torch.arange(steps, dtype=torch.float64) / max(steps - 1, 1)
        custom = 1.0 + s * (lowest - 1.0)
    sigmas = _dynamic(config, mu, custom) if dynamic else _shifted(custom, shift)
    sigmas = _stretched(config, sigmas)
    modifier = modifier_of(config)
    if modifier is not None:
        high, low = _ends(config, sigmas)
        sigmas = spread(modifier, high, low, len(sigmas), config)
    return sigmas


def _unipc(
    config: _Config, steps: int | None, custom: Tensor | None, mu: float | None
) -> tuple[Tensor, float]:
    if config.get("use_karras_sigmas"):
        return _unipc_karras(config, steps, custom)
    if custom is None:
        assert steps is not None
        lowest = 1.0 / int(config["num_train_timesteps"])
        custom = torch.linspace(1, lowest, steps + 1, dtype=torch.float64)[:-1]
    dynamic = bool(config.get("use_dynamic_shifting"))
    sigmas = _dynamic(config, mu, custom) if dynamic else _shifted(custom, static_shift(config))
    sigmas = _stretched(config, sigmas)
    if abs(float(sigmas[0]) - 1) < BELOW_ONE:
        # as float32 holds it: 1 - sigma is 1.3 % larger there, and "bh1" weights follow its logarithm
        below = (sigmas[:1] - BELOW_ONE).float().double()
        sigmas = torch.cat([below, sigmas[1:]])
    return sigmas, _end(config, sigmas)


def _unipc_karras(
    config: _Config, steps: int | None, custom: Tensor | None
) -> tuple[Tensor, float]:
    """Karras levels of sigma / alpha in the range of the config, or of its betas, as flow levels."""
    if custom is None:
        bar = make_alphas_cumprod(config, make_betas(config)).double()
        custom = ((1 - bar) / bar).sqrt().flip(0)[[0, -1]]
    else:
        steps = len(custom)
        if config.get("sigma_max") is None or config.get("sigma_min") is None:
            raise ValueError(
                "sigmas are given with use_karras_sigmas: they need the config's sigma_min and sigma_max"
            )
    assert steps is not None
    high, low = _ends(config, custom)
    sigmas = spread("karras_sigmas", high, low, steps, {})
    sigmas = sigmas / (sigmas + 1)
    return sigmas, _end(config, sigmas)


def _ends(config: _Config, sigmas: Tensor) -> tuple[float, float]:
    """``sigma_max`` and ``sigma_min`` of the config, or the first and last of ``sigmas``."""
    high, low = config.get("sigma_max"), config.get("sigma_min")
    return (
        float(sigmas[0]) if high is None else float(high),
        float(sigmas[-1]) if low is None else float(low),
    )


def _end(config: _Config, sigmas: Tensor | None) -> float:
    kind = config.get("final_sigmas_type") or "zero"
    if kind not in ("zero", "sigma_min"):
        raise ValueError(f"final_sigmas_type is {kind!r}, expected 'zero' or 'sigma_min'")
    if kind == "zero":
        return 0.0
    if sigmas is not None:
        return float(sigmas[-1])
    bar = float(make_alphas_cumprod(config, make_betas(config))[0])
    return float(((1 - bar) / bar) ** 0.5)


def _between(config: _Config, steps: int | None) -> Tensor:
    """The multistep classes' levels: the ends of ``steps`` + 1 equal parts below 1 - 1 / N."""
    assert steps is not None
    lowest = 1.0 / int(config["num_train_timesteps"])
    return (1 - torch.linspace(1, lowest, steps + 1, dtype=torch.float64)).flip(0)[:-1]


def _shifted(sigmas: Tensor, shift: float) -> Tensor:
    return shift * sigmas / (1 + (shift - 1) * sigmas)


def _stretched(config: _Config, sigmas: Tensor) -> Tensor:
    """``shift_terminal``: the last level is moved there, the others in proportion."""
    if not config.get("shift_terminal") or float(sigmas[-1]) >= 1:
        return sigmas
    rest = 1 - sigmas
    return 1 - rest * ((1 - float(config["shift_terminal"])) / rest[-1])


def _dynamic(config: _Config, mu: float | None, sigmas: Tensor) -> Tensor:
    kind = str(config.get("time_shift_type") or "exponential")
    if kind not in ("exponential", "linear"):
        raise ValueError(f"time_shift_type is {kind!r}, expected 'exponential' or 'linear'")
    assert mu is not None
    strength = math.exp(mu) if kind == "exponential" else mu
    # 1 at sigma = 1 exactly: strength / (strength + 0)
    return strength / (strength + (1 / sigmas - 1))
