"""Whether a network takes the noise of a sample for what it is.

No answer to a noisy sample has a smaller expected error than E[x0 | x], the network's own at its own
time. Where the same network on the same input comes nearer to the data when it is called as for another
noise level, its process has another schedule than the one it was given: a line in place of a cosine,
alphas in place of their products. It denoises all the same, only less well.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...models.denoiser import Denoiser
from ...models.preconditioning import NamedTime
from .levels import deviation_of, noisy

FACTORS = (1.0, 0.25, 0.5, 0.5**0.5, 2.0**0.5, 2.0, 4.0)
"""Of the noise level that the network is called for; its own first."""
GAIN = 1.1
"""Least ratio of squared errors that says so, a geometric mean over the levels: on their own process the
models of the package and the published ones gain less than .01."""
SURE, LEAST_SAMPLES = 4.0, 8
"""Standard errors by which it must differ from none, and samples that these can be said of: a few points
of a plane gain .1 and more by chance."""
_FLOOR = 1e-10
"""Squared error that counts as none, in variances of the data."""


@dataclass(frozen=True)
class OtherTimes:
    """The network errs ``gain`` times less when called as for ``low`` to ``high`` times the noise."""

    gain: float
    low: float
    high: float

    def __str__(self) -> str:
        return (
            f"another schedule (the network called as for {self.low:.2g} to {self.high:.2g} times the "
            "noise)"
        )


class AtLevel(NamedTime):
    """The time argument of ``denoiser`` at ``factor`` times the noise level of t."""

    def __init__(self, denoiser: Denoiser, factor: float) -> None:
        own = denoiser._time_input
        name = own.name if isinstance(own, NamedTime) else ""
        super().__init__(denoiser.network_process, name, 1.0)
        self.denoiser, self.factor = denoiser, factor

    def __call__(self, t: Tensor) -> Tensor:
        process = self.process
        other = process.inverse_sigma(self.factor * process.sigma_over_alpha(t))
        return self.denoiser._noise_level(other.clamp(process.t_min, process.t_max))


def better_times(
    denoiser: Denoiser, data: Tensor, conditions: Mapping[str, Any]
) -> OtherTimes | None:
    """Times at which ``denoiser`` comes nearer to ``data`` ``[B, ...]`` than at its own, if there are."""
    if len(data) < LEAST_SAMPLES:
        return None
    variants = [denoiser, *(called_for(denoiser, factor) for factor in FACTORS[1:])]
    logs, moved = [], []
    apart = torch.zeros(len(data), dtype=torch.float64, device="cpu")
    floor = _FLOOR * deviation_of(data) ** 2
    for x, t, _ in noisy(denoiser.process, data):
        answers = [each.predict(x, t, "data", **conditions) for each in variants]
        errors = torch.stack([_squares(answer - data) + floor for answer in answers])
        means = errors.mean(1)
        best = int(means.argmin())
        if not math.isfinite(float(means[0])):
            return None
        logs.append(math.log(float(means[0] / means[best])))
        moved += [FACTORS[best]] if best else []
        apart += (errors[0] - errors[best]) / means[best]
    gain = math.exp(sum(logs) / max(1, len(logs)))
    sure = float(apart.mean()) > SURE * float(apart.std()) / math.sqrt(len(data))
    return OtherTimes(gain, min(moved), max(moved)) if gain > GAIN and sure else None


def _squares(errors: Tensor) -> Tensor:
    """Mean square of each sample, float64 ``[B]`` on the CPU; infinite for what is no number."""
    return errors.double().square().flatten(1).mean(1).cpu().nan_to_num(nan=math.inf)


def called_for(denoiser: Denoiser, factor: float) -> Denoiser:
    """``denoiser`` whose network is called as for ``factor`` times the noise that its input has."""
    return changed(denoiser, _time_input=AtLevel(denoiser, factor))


def changed(denoiser: Denoiser, **attributes: Any) -> Denoiser:
    """A copy of ``denoiser``, on the same network, with other ``attributes``."""
    variant = copy.copy(denoiser)
    variant.__dict__ = dict(denoiser.__dict__)
    for name, value in attributes.items():
        setattr(variant, name, value)
    return variant
