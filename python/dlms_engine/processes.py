"""Noise processes x_t = alpha(t) x_0 + sigma(t) z: coefficients, log-SNR and their inverses.

All arithmetic is float64 and differentiable; arguments broadcast; floats are accepted.
``lambda_`` = log(alpha / sigma) rises as t falls. Times are in the process's own unit.
"""

from __future__ import annotations

import json
import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor


def as_float64(value: Tensor | float) -> Tensor:
    """``value`` as a float64 tensor; keeps device and autograd graph."""
    return torch.as_tensor(value, dtype=torch.float64)


class Process(ABC):
    """A noise process on [t_min, t_max]; subclasses give three formulas and two inverses.

    Raises:
        ValueError: the range is not 0 <= t_min < t_max, or is not finite.
    """

    name: ClassVar[str]

    def __init__(self, t_min: float, t_max: float) -> None:
        if not (0.0 <= t_min < t_max and math.isfinite(t_max)):
            raise ValueError(
                f"{type(self).__name__}: t_min is {t_min}, t_max is {t_max}, "
                "expected finite 0 <= t_min < t_max"
            )
        self.t_min = float(t_min)
        self.t_max = float(t_max)

    @abstractmethod
    def alpha(self, t: Tensor | float) -> Tensor:
        """Scale of the data at time ``t``, float64, same shape."""

    @abstractmethod
    def sigma(self, t: Tensor | float) -> Tensor:
        """Standard deviation of the noise at time ``t``, float64, same shape."""

    @abstractmethod
    def log_alpha(self, t: Tensor | float) -> Tensor:
        """log alpha(t)."""

    @abstractmethod
    def sigma_over_alpha(self, t: Tensor | float) -> Tensor:
        """sigma(t) / alpha(t), the noise level of the rescaled state x / alpha."""

    @abstractmethod
    def inverse_sigma(self, sigma_over_alpha: Tensor | float) -> Tensor:
        """The time at which sigma / alpha takes this value (not sigma itself)."""

    @abstractmethod
    def config(self) -> dict[str, Any]:
        """JSON-able arguments; ``from_config(process.config())`` is an equal process."""

    def lambda_(self, t: Tensor | float) -> Tensor:
        """Half log-SNR log(alpha(t) / sigma(t)); infinite where alpha or sigma is zero."""
        return -torch.log(self.sigma_over_alpha(t))

    def inverse_lambda(self, lambda_: Tensor | float) -> Tensor:
        """The time at which ``lambda_`` takes this value."""
        return self.inverse_sigma(torch.exp(-as_float64(lambda_)))

    def breakpoints(self) -> Tensor | None:
        """Values of sigma / alpha, rising, between which it is smooth in t; None if everywhere."""
        return None

    def __repr__(self) -> str:
        arguments = ", ".join(
            f"{key}={value!r}" if not isinstance(value, list) else f"{key}=<{len(value)} values>"
            for key, value in self.config().items()
            if key != "name"
        )
        return f"{type(self).__name__}({arguments})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Process) and self.config() == other.config()

    def __hash__(self) -> int:
        return hash(json.dumps(self.config(), sort_keys=True))


class EDM(Process):
    """Variance exploding: alpha = 1, sigma = t (Karras et al. 2022, Table 1)."""

    name = "edm"

    def __init__(self, t_min: float = 0.002, t_max: float = 80.0) -> None:
        super().__init__(t_min, t_max)

    def alpha(self, t: Tensor | float) -> Tensor:
        return torch.ones_like(as_float64(t))

    def sigma(self, t: Tensor | float) -> Tensor:
        return as_float64(t)

    def log_alpha(self, t: Tensor | float) -> Tensor:
        return torch.zeros_like(as_float64(t))

    def sigma_over_alpha(self, t: Tensor | float) -> Tensor:
        return as_float64(t)

    def inverse_sigma(self, sigma_over_alpha: Tensor | float) -> Tensor:
        return as_float64(sigma_over_alpha)

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
        if not (self.beta_d >= 0 and slope > 0 and start > -1e-12):
            raise ValueError(
                f"VP: beta_d is {beta_d}, beta_min is {beta_min}, expected beta_d >= 0 and noise "
                f"that rises from t_min = {t_min}"
            )

    @classmethod
    def fitted(cls, sigma_min: float, sigma_max: float, eps: float = 1e-3) -> VP:
        """The line with sigma/alpha = sigma_min at t = eps and sigma_max at t = 1.

        It gives a variance-exploding range a VP time (Karras et al. 2022, Appendix C.1;
        17.537957 and -0.004769 for 0.002 and 80).
        """
        low, high = math.log1p(sigma_min**2), math.log1p(sigma_max**2)
        beta_d = 2 * (low / eps - high) / (eps - 1)
        return cls(beta_d, high - beta_d / 2, t_min=eps, t_max=1.0)

    def _integral(self, t: Tensor | float) -> Tensor:
        t = as_float64(t)
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
        return self._from_integral(torch.log1p(as_float64(sigma_over_alpha) ** 2))

    def inverse_lambda(self, lambda_: Tensor | float) -> Tensor:
        lambda_ = as_float64(lambda_)
        return self._from_integral(torch.logaddexp(torch.zeros_like(lambda_), -2 * lambda_))

    def _from_integral(self, integral: Tensor) -> Tensor:
        root = torch.sqrt(self.beta_min**2 + 2 * self.beta_d * integral)
        if self.beta_min >= 0:  # the other form of the same root would cancel
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


class VPDiscrete(Process):
    """A table of N noise levels made continuous: log alpha is piecewise linear in t.

    Knots t_n = n / N, n = 1..N, as in DPM-Solver (Lu et al. 2022a, Appendix D.1), plus the noise-free
    point t = 0, so that sampling may end at sigma = 0; above t = 1 the last line goes on.
    Give either ``betas`` or ``alphas_cumprod`` (= alpha^2), N >= 2 values.
    """

    name = "vp_discrete"

    def __init__(
        self,
        *,
        betas: Tensor | Sequence[float] | None = None,
        alphas_cumprod: Tensor | Sequence[float] | None = None,
        t_min: float | None = None,
        t_max: float = 1.0,
    ) -> None:
        if (betas is None) == (alphas_cumprod is None):
            raise ValueError("VPDiscrete: give exactly one of betas and alphas_cumprod")
        key, given = ("betas", betas) if betas is not None else ("alphas_cumprod", alphas_cumprod)
        values = torch.as_tensor(given, dtype=torch.float64).detach().cpu()
        if values.ndim != 1 or len(values) < 2:
            raise ValueError(
                f"VPDiscrete: {key} has shape {tuple(values.shape)}, expected [N], N >= 2"
            )
        if not bool(((values > 0) & (values < 1)).all()):
            raise ValueError(
                f"VPDiscrete: {key} ranges over {values.min():.3g}..{values.max():.3g}, expected "
                "values inside (0, 1); for a zero terminal SNR drop the last level"
            )
        log_alpha = (
            0.5 * torch.log1p(-values).cumsum(0) if key == "betas" else 0.5 * torch.log(values)
        )
        if not bool((log_alpha.diff() < 0).all()):
            raise ValueError(f"VPDiscrete: {key} must give strictly falling alphas")
        self.levels = len(values)
        super().__init__(1.0 / self.levels if t_min is None else t_min, t_max)
        self._given = (key, values.tolist())
        self._log_alpha = torch.cat([log_alpha.new_zeros(1), log_alpha])

    def timestep(self, t: Tensor | float) -> Tensor:
        """The model's (fractional) index at ``t``: N t - 1, i.e. 0 for the first level."""
        return self.levels * as_float64(t) - 1

    def alpha(self, t: Tensor | float) -> Tensor:
        return torch.exp(self.log_alpha(t))

    def sigma(self, t: Tensor | float) -> Tensor:
        return torch.sqrt(-torch.expm1(2 * self.log_alpha(t)))

    def sigma_over_alpha(self, t: Tensor | float) -> Tensor:
        return torch.sqrt(torch.expm1(-2 * self.log_alpha(t)))

    def log_alpha(self, t: Tensor | float) -> Tensor:
        position = as_float64(t) * self.levels
        knot = position.detach().floor().clamp(0, self.levels - 1).long()
        values = self._log_alpha.to(position.device)
        weight = position - knot
        return (1 - weight) * values[knot] + weight * values[knot + 1]

    def _from_log_alpha(self, log_alpha: Tensor) -> Tensor:
        values = self._log_alpha.to(log_alpha.device)
        knot = torch.searchsorted(-values, -log_alpha.detach().contiguous()) - 1
        knot = knot.clamp(0, self.levels - 1)
        weight = (log_alpha - values[knot]) / (values[knot + 1] - values[knot])
        return (knot + weight) / self.levels

    def inverse_sigma(self, sigma_over_alpha: Tensor | float) -> Tensor:
        return self._from_log_alpha(-0.5 * torch.log1p(as_float64(sigma_over_alpha) ** 2))

    def inverse_lambda(self, lambda_: Tensor | float) -> Tensor:
        lambda_ = as_float64(lambda_)
        return self._from_log_alpha(-0.5 * torch.logaddexp(torch.zeros_like(lambda_), -2 * lambda_))

    def breakpoints(self) -> Tensor | None:
        return torch.sqrt(torch.expm1(-2 * self._log_alpha))

    def config(self) -> dict[str, Any]:
        key, values = self._given
        return {"name": self.name, key: values, "t_min": self.t_min, "t_max": self.t_max}


class Cosine(Process):
    """alpha = cos(a) / cos(b), a = pi/2 (t + s)/(1 + s), b = a(0) (Nichol & Dhariwal 2021, eq. 17).

    t_max = 0.9946 by default, short of alpha = 0 (Lu et al. 2022a, Appendix D.1).
    """

    name = "cosine"

    def __init__(self, s: float = 0.008, t_min: float = 1e-3, t_max: float = 0.9946) -> None:
        super().__init__(t_min, t_max)
        if not (s >= 0 and t_max < 1):
            raise ValueError(f"Cosine: s is {s}, t_max is {t_max}, expected s >= 0 and t_max < 1")
        self.s = float(s)
        self._rate = math.pi / 2 / (1 + self.s)
        self._offset = self._rate * self.s

    def alpha(self, t: Tensor | float) -> Tensor:
        return torch.cos(self._rate * as_float64(t) + self._offset) / math.cos(self._offset)

    def sigma(self, t: Tensor | float) -> Tensor:
        # cos(b)^2 - cos(a)^2 = sin(a - b) sin(a + b): no cancellation near t = 0
        a = self._rate * as_float64(t)
        return torch.sqrt(torch.sin(a) * torch.sin(a + 2 * self._offset)) / math.cos(self._offset)

    def log_alpha(self, t: Tensor | float) -> Tensor:
        return torch.log(self.alpha(t))

    def sigma_over_alpha(self, t: Tensor | float) -> Tensor:
        return self.sigma(t) / self.alpha(t)

    def inverse_sigma(self, sigma_over_alpha: Tensor | float) -> Tensor:
        ratio = as_float64(sigma_over_alpha)
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
        return 1 - as_float64(t)

    def sigma(self, t: Tensor | float) -> Tensor:
        return as_float64(t)

    def log_alpha(self, t: Tensor | float) -> Tensor:
        return torch.log1p(-as_float64(t))

    def sigma_over_alpha(self, t: Tensor | float) -> Tensor:
        t = as_float64(t)
        return t / (1 - t)

    def lambda_(self, t: Tensor | float) -> Tensor:
        t = as_float64(t)
        return torch.log1p(-t) - torch.log(t)

    def inverse_sigma(self, sigma_over_alpha: Tensor | float) -> Tensor:
        ratio = as_float64(sigma_over_alpha)
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
