"""Noise processes x_t = alpha(t) x_0 + sigma(t) z: coefficients, log-SNR and their inverses.

All arithmetic is float64 and differentiable; arguments broadcast; floats are accepted.
``lambda_`` = log(alpha / sigma) rises as t falls. Times are in the process's own unit.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from .base import Process, as_float64, as_level
from .discrete import VPDiscrete

__all__ = [
    "EDM",
    "PROCESSES",
    "VP",
    "Cosine",
    "Process",
    "RectifiedFlow",
    "VPDiscrete",
    "as_float64",
    "edm_coordinates",
    "from_config",
    "require_known",
]


class EDM(Process):
    """Variance exploding: alpha = 1, sigma = t (Karras et al. 2022, Table 1)."""

    name = "edm"

    def __init__(self, t_min: float = 0.002, t_max: float = 80.0) -> None:
        super().__init__(t_min, t_max)

    def alpha(self, t: Tensor | float) -> Tensor:
        return torch.ones_like(as_level(t))

    def sigma(self, t: Tensor | float) -> Tensor:
        return as_level(t)

    def log_alpha(self, t: Tensor | float) -> Tensor:
        return torch.zeros_like(as_level(t))

    def sigma_over_alpha(self, t: Tensor | float) -> Tensor:
        return as_level(t)

    def inverse_sigma(self, sigma_over_alpha: Tensor | float) -> Tensor:
        return as_level(sigma_over_alpha)

    def config(self) -> dict[str, Any]:
        return {"name": self.name, "t_min": self.t_min, "t_max": self.t_max}


class VP(Process):
    """Variance preserving, linear beta(t) = beta_min + beta_d t (Song et al. 2021, eq. 32).

    alpha^2 = exp(-L), sigma^2 = 1 - exp(-L), L = beta_d t^2 / 2 + beta_min t. ``beta_min`` may be
    slightly negative (a line fitted to a noise range, see ``VP.fitted``) as long as L is positive
    and rising on [t_min, t_max].
    """

    name = "vp"

    def __init__(
        self,
        beta_d: float = 19.9,
        beta_min: float = 0.1,
        t_min: float = 1e-3,
        t_max: float = 1.0,
    ) -> None:
        super().__init__(t_min, t_max)
        self.beta_d = float(beta_d)
        self.beta_min = float(beta_min)
        slope = self.beta_min + self.beta_d * self.t_min
        start = self.t_min * (self.beta_d * self.t_min / 2 + self.beta_min)
        if not (math.inf > self.beta_d >= 0 and math.inf > slope > 0 and start > -1e-12):
            raise ValueError(
                f"VP: beta_d is {beta_d}, beta_min is {beta_min}, expected finite beta_d >= 0 and noise "
                f"that rises from t_min = {t_min}"
            )

    @classmethod
    def fitted(cls, sigma_min: float, sigma_max: float, eps: float = 1e-3) -> VP:
        """The line with sigma/alpha = sigma_min at t = eps and sigma_max at t = 1.

        It gives a variance-exploding range a VP time (Karras et al. 2022, Appendix C.1;
        17.537957 and -0.004769 for 0.002 and 80). A range so narrow that this line would not rise
        takes the part of the default line it covers.
        """
        if not 0 <= sigma_min < sigma_max < math.inf:
            raise ValueError(
                f"sigma_min is {sigma_min}, sigma_max is {sigma_max}, expected finite "
                "0 <= sigma_min < sigma_max"
            )
        low, high = math.log1p(sigma_min**2), math.log1p(sigma_max**2)
        beta_d = 2 * (low / eps - high) / (eps - 1)
        if beta_d < 0:
            line = cls()
            ends = [float(line.inverse_sigma(sigma)) for sigma in (sigma_min, sigma_max)]
            return cls(t_min=ends[0], t_max=ends[1])
        return cls(beta_d, high - beta_d / 2, t_min=eps, t_max=1.0)

    def _integral(self, t: Tensor | float) -> Tensor:
        t = as_level(t)
        return t * (0.5 * self.beta_d * t + self.beta_min)

    def alpha(self, t: Tensor | float) -> Tensor:
        return torch.exp(-0.5 * self._integral(t))

    def sigma(self, t: Tensor | float) -> Tensor:
        return torch.sqrt(-torch.expm1(-self._integral(t)))

    def log_alpha(self, t: Tensor | float) -> Tensor:
        return -0.5 * self._integral(t)

    def sigma_over_alpha(self, t: Tensor | float) -> Tensor:
        return torch.sqrt(torch.expm1(self._integral(t)))

    def inverse_sigma(self, sigma_over_alpha: Tensor | float) -> Tensor:
        return self._from_integral(torch.log1p(as_level(sigma_over_alpha) ** 2))

    def inverse_lambda(self, lambda_: Tensor | float) -> Tensor:
        lambda_ = as_float64(lambda_)
        return self._from_integral(torch.logaddexp(torch.zeros_like(lambda_), -2 * lambda_))

    def _from_integral(self, integral: Tensor) -> Tensor:
        root = torch.sqrt(self.beta_min**2 + 2 * self.beta_d * integral)
        if self.beta_min > 0:  # the other form of the same root would cancel
            return 2 * integral / (root + self.beta_min)
        return (root - self.beta_min) / self.beta_d

    def config(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "beta_d": self.beta_d,
            "beta_min": self.beta_min,
            "t_min": self.t_min,
            "t_max": self.t_max,
        }


class Cosine(Process):
    """alpha = cos(a) / cos(b), a = pi/2 (t + s)/(1 + s), b = a(0) (Nichol & Dhariwal 2021, eq. 17).

    t_max = 0.9946 by default, short of alpha = 0 (Lu et al. 2022a, Appendix D.1).
    """

    name = "cosine"

    def __init__(self, s: float = 0.008, t_min: float = 1e-3, t_max: float = 0.9946) -> None:
        super().__init__(t_min, t_max)
        if not (math.inf > s >= 0 and t_max < 1):
            raise ValueError(
                f"Cosine: s is {s}, t_max is {t_max}, expected finite s >= 0 and t_max < 1"
            )
        self.s = float(s)
        self._rate = math.pi / 2 / (1 + self.s)
        self._offset = self._rate * self.s

    def alpha(self, t: Tensor | float) -> Tensor:
        return torch.cos(self._rate * as_level(t) + self._offset) / math.cos(self._offset)

    def sigma(self, t: Tensor | float) -> Tensor:
        # cos(b)^2 - cos(a)^2 = sin(a - b) sin(a + b): no cancellation near t = 0
        a = self._rate * as_level(t)
        return torch.sqrt(torch.sin(a) * torch.sin(a + 2 * self._offset)) / math.cos(self._offset)

    def log_alpha(self, t: Tensor | float) -> Tensor:
        return torch.log(self.alpha(t))

    def sigma_over_alpha(self, t: Tensor | float) -> Tensor:
        return self.sigma(t) / self.alpha(t)

    def inverse_sigma(self, sigma_over_alpha: Tensor | float) -> Tensor:
        ratio = as_level(sigma_over_alpha)
        tangent = torch.sqrt(ratio**2 + math.sin(self._offset) ** 2) / math.cos(self._offset)
        return (torch.atan(tangent) - self._offset) / self._rate

    def config(self) -> dict[str, Any]:
        return {"name": self.name, "s": self.s, "t_min": self.t_min, "t_max": self.t_max}


class RectifiedFlow(Process):
    """Straight paths: alpha = 1 - t, sigma = t (Liu et al. 2023), ends included.

    At t = 1 the state is pure noise: alpha = 0 and lambda_ = -inf; at t = 0 lambda_ = +inf.
    """

    name = "rectified_flow"

    def __init__(self, t_min: float = 0.0, t_max: float = 1.0) -> None:
        super().__init__(t_min, t_max)
        if t_max > 1:
            raise ValueError(f"RectifiedFlow: t_max is {t_max}, expected at most 1")

    def alpha(self, t: Tensor | float) -> Tensor:
        return 1 - as_level(t)

    def sigma(self, t: Tensor | float) -> Tensor:
        return as_level(t)

    def log_alpha(self, t: Tensor | float) -> Tensor:
        return torch.log1p(-as_level(t))

    def sigma_over_alpha(self, t: Tensor | float) -> Tensor:
        t = as_level(t)
        return t / (1 - t)

    def lambda_(self, t: Tensor | float) -> Tensor:
        t = as_level(t)
        return torch.log1p(-t) - torch.log(t)

    def inverse_sigma(self, sigma_over_alpha: Tensor | float) -> Tensor:
        ratio = as_level(sigma_over_alpha)
        infinite = torch.isinf(ratio)
        finite = torch.where(infinite, torch.ones_like(ratio), ratio)
        return torch.where(infinite, torch.ones_like(ratio), finite / (1 + finite))

    def inverse_lambda(self, lambda_: Tensor | float) -> Tensor:
        return torch.sigmoid(-as_float64(lambda_))

    def config(self) -> dict[str, Any]:
        return {"name": self.name, "t_min": self.t_min, "t_max": self.t_max}


PROCESSES: dict[str, type[Process]] = {
    kind.name: kind for kind in (EDM, VP, VPDiscrete, Cosine, RectifiedFlow)
}


def edm_coordinates(process: Process) -> EDM:
    """The process of x / alpha: its time is sigma / alpha, the noise level of Karras et al. 2022.

    Raises:
        ValueError: sigma / alpha is infinite at the start (a flow at t = 1, zero terminal SNR).
    """
    low, high = (float(process.sigma_over_alpha(t)) for t in (process.t_min, process.t_max))
    if not math.isfinite(high):
        raise ValueError(
            f"sigma / alpha is {high} at t = {process.t_max} of {process!r}: EDM's coordinates need a "
            "finite level, so use coordinates='process', or a process that starts at t_max=0.999"
        )
    return EDM(low, high)


def require_known(process: Process) -> None:
    """Raises for a process that a solver file could not name: ``from_config`` would not make it again.

    Raises:
        ValueError: its ``name`` is not that of its class in ``PROCESSES``.
    """
    kind, name = type(process), process.config().get("name")
    if PROCESSES.get(str(name)) is not kind:
        entry = f"PROCESSES[{name!r}] = {kind.__name__}"
        raise ValueError(
            f"process {name!r} ({kind.__name__}) is not in dlms_engine.processes.PROCESSES, so that "
            f"files of its solvers could not be read: {entry}, also where they are"
        )


def from_config(config: Mapping[str, Any]) -> Process:
    """The process a ``config()`` describes.

    Raises:
        ValueError: unknown ``name``, unknown or missing arguments, or values out of range.
    """
    arguments = dict(config)
    name = arguments.pop("name", None)
    if name not in PROCESSES:
        raise ValueError(f"process name is {name!r}, expected one of {sorted(PROCESSES)}")
    try:
        return PROCESSES[name](**arguments)
    except (TypeError, RuntimeError) as exc:
        raise ValueError(f"process {name!r} does not take {sorted(arguments)}: {exc}") from exc
