"""Noise levels spread between two ends: Karras, exponential, beta and lambda spacings."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

MODIFIERS = ("karras_sigmas", "exponential_sigmas", "beta_sigmas", "lu_lambdas")


def modifier_of(config: Mapping[str, Any]) -> str | None:
    """The one of ``MODIFIERS`` that is switched on.

    Raises:
        ValueError: more than one is.
    """
    active = [name for name in MODIFIERS if config.get(f"use_{name}")]
    if len(active) > 1:
        raise ValueError(f"use_{active[0]} and use_{active[1]} are both set: only one can be used")
    return active[0] if active else None


def spread(kind: str, high: float, low: float, steps: int, config: Mapping[str, Any]) -> Tensor:
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
