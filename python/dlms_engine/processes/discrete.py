"""``VPDiscrete``: a model's table of noise levels as a process."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .base import Process, as_float64, as_level


class VPDiscrete(Process):
    """A table of N noise levels made continuous: log alpha is piecewise linear in t.

    Knots t_n = n / N, n = 1..N, as in DPM-Solver (Lu et al. 2022a, Appendix D.1), plus the
    noise-free point t = 0, so that sampling may end at sigma = 0; above t = 1 the last line goes
    on. Give either ``betas`` or ``alphas_cumprod`` (= alpha^2), N >= 2 values.
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
        assert given is not None
        values = as_float64(given).detach().cpu()
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
        self._copies: dict[torch.device, Tensor] = {}

    def _levels_on(self, device: torch.device) -> Tensor:
        """The table on ``device``, copied once: a captured run may not copy from the host."""
        if device.type == "cpu":
            return self._log_alpha
        if device not in self._copies:
            with torch.inference_mode(False):  # kept for calls outside of it
                moved = self._log_alpha.to(device)
            if torch.compiler.is_compiling():  # a tensor of the trace, which must not outlive it
                return moved
            self._copies[device] = moved
        return self._copies[device]

    def timestep(self, t: Tensor | float) -> Tensor:
        """The model's (fractional) index at ``t``: N t - 1, i.e. 0 for the first level."""
        return self.levels * as_level(t) - 1

    def alpha(self, t: Tensor | float) -> Tensor:
        return torch.exp(self.log_alpha(t))

    def sigma(self, t: Tensor | float) -> Tensor:
        return torch.sqrt(-torch.expm1(2 * self.log_alpha(t)))

    def sigma_over_alpha(self, t: Tensor | float) -> Tensor:
        return torch.sqrt(torch.expm1(-2 * self.log_alpha(t)))

    def log_alpha(self, t: Tensor | float) -> Tensor:
        position = as_level(t) * self.levels
        knot = position.detach().floor().clamp(0, self.levels - 1).long()
        values = self._levels_on(position.device)
        weight = position - knot
        # Not values[knot]: with a scalar knot that reads a number on the host.
        left, right = torch.take(values, knot), torch.take(values, knot + 1)
        return (1 - weight) * left + weight * right

    def _from_log_alpha(self, log_alpha: Tensor) -> Tensor:
        values = self._levels_on(log_alpha.device)
        knot = torch.searchsorted(-values, -log_alpha.detach().contiguous()) - 1
        knot = knot.clamp(0, self.levels - 1)
        left, right = torch.take(values, knot), torch.take(values, knot + 1)
        weight = (log_alpha - left) / (right - left)
        return (knot + weight) / self.levels

    def inverse_sigma(self, sigma_over_alpha: Tensor | float) -> Tensor:
        return self._from_log_alpha(-0.5 * torch.log1p(as_level(sigma_over_alpha) ** 2))

    def inverse_lambda(self, lambda_: Tensor | float) -> Tensor:
        lambda_ = as_float64(lambda_)
        return self._from_log_alpha(-0.5 * torch.logaddexp(torch.zeros_like(lambda_), -2 * lambda_))

    def breakpoints(self) -> Tensor | None:
        return torch.sqrt(torch.expm1(-2 * self._log_alpha))

    def config(self) -> dict[str, Any]:
        key, values = self._given
        return {"name": self.name, key: values, "t_min": self.t_min, "t_max": self.t_max}
