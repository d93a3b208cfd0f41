"""What a network returns and how it takes the time, as coefficients of its input and output."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, NamedTuple, cast

import torch
from torch import Tensor

from ..processes import EDM, Process, RectifiedFlow, VPDiscrete
from ..support.values import is_finite_number

NetworkPrediction = Literal["data", "noise", "velocity", "flow", "reverse_flow", "edm"]
PREDICTIONS = ("data", "noise", "velocity", "flow", "reverse_flow", "edm")
BLIND_AT_NOISE = ("noise", "edm")
"""Predictions that say nothing about the data where alpha = 0."""
TimeInput = Callable[[Tensor], Tensor] | Literal["t", "reversed", "sigma", "log_sigma", "index"]
TIME_INPUTS = ("t", "reversed", "sigma", "log_sigma", "index")


class Preconditioning(NamedTuple):
    """float64 coefficients, each shaped like the times they were asked for.

    quantity = c_skip * x + c_out * network(c_in * x, c_noise)
    """

    c_skip: Tensor
    c_out: Tensor
    c_in: Tensor
    c_noise: Tensor


def coefficients(
    prediction: NetworkPrediction,
    sigma_data: float,
    alpha: Tensor,
    sigma: Tensor,
    quantity: Literal["data", "noise"],
) -> tuple[Tensor, Tensor, Tensor]:
    """(c_skip, c_out, c_in) of a network that returns ``prediction``, in float64.

    Written out per case, without the cancellation of going through the data prediction.
    """
    one, zero = torch.ones_like(alpha), torch.zeros_like(alpha)
    c_in = one
    if prediction == "edm":
        var = (sigma / alpha) ** 2 + sigma_data**2
        c_in = var.rsqrt() / alpha
        if quantity == "data":
            c_skip = sigma_data**2 / var / alpha
            c_out = sigma / alpha * sigma_data * var.rsqrt()
        else:
            c_skip = sigma / (alpha**2 * var)
            c_out = -sigma_data * var.rsqrt()
    elif prediction == "data":
        c_skip, c_out = (zero, one) if quantity == "data" else (1 / sigma, -alpha / sigma)
    elif prediction == "noise":
        c_skip, c_out = (1 / alpha, -sigma / alpha) if quantity == "data" else (zero, one)
    elif prediction == "velocity":
        norm = alpha**2 + sigma**2
        c_skip, c_out = (alpha, -sigma) if quantity == "data" else (sigma, alpha)
        c_skip, c_out = c_skip / norm, c_out / norm
    else:
        norm = alpha + sigma
        c_skip, c_out = (one, -sigma) if quantity == "data" else (one, alpha)
        sign = -1.0 if prediction == "reverse_flow" else 1.0
        c_skip, c_out = c_skip / norm, sign * c_out / norm
    return c_skip, c_out, c_in


def check_positive(name: str, value: Any) -> None:
    if not (is_finite_number(value) and value > 0):
        raise ValueError(f"{name} is {value!r}, expected a finite number > 0")


class NamedTime:
    """A time argument by name, as a function of t that can be copied and pickled."""

    def __init__(self, process: Process, name: str, scale: float) -> None:
        self.process, self.name, self.scale = process, name, scale

    @property
    def whole(self) -> bool:
        """Whether the network reads a table by it, which takes whole numbers."""
        return self.name == "index"

    def __call__(self, t: Tensor) -> Tensor:
        if self.name == "t":
            return self.scale * t
        if self.name == "reversed":
            return self.scale * (1 - t)
        if self.name == "index":
            process = cast(VPDiscrete, self.process)
            return process.timestep(t).clamp(0, process.levels - 1)
        ratio = self.process.sigma_over_alpha(t)
        return self.scale * (ratio if self.name == "sigma" else torch.log(ratio))


def time_function(
    process: Process, given: TimeInput | None, scale: float | None
) -> Callable[[Tensor], Tensor] | None:
    if scale is not None:
        check_positive("time_scale", scale)
    if isinstance(given, str):
        if given not in TIME_INPUTS:
            raise ValueError(
                f"time_input is {given!r}, expected a function of t or one of {TIME_INPUTS}"
            )
        if given == "index" and not (isinstance(process, VPDiscrete) and scale is None):
            raise ValueError(
                "time_input='index' is the nearest of a VPDiscrete's times, as whole numbers and "
                f"without a time_scale; the process is {type(process).__name__}"
            )
        return NamedTime(process, given, 1.0 if scale is None else float(scale))
    if scale is not None:
        raise ValueError(
            f"time_scale is {scale}: it goes with a time_input by name, one of {TIME_INPUTS}"
        )
    return given


def like_times(level: Any, t: Tensor) -> Tensor:
    """``level``, which a ``time_input`` gave for times ``t``.

    Raises:
        ValueError: it is no tensor of that shape.
    """
    if isinstance(level, Tensor) and level.shape == t.shape:
        return level
    given = list(level.shape) if isinstance(level, Tensor) else type(level).__name__
    raise ValueError(
        f"time_input gave {given} for times {list(t.shape)}, expected a tensor like them"
    )


def usual_prediction(process: Process) -> NetworkPrediction:
    """What networks on ``process`` mostly return."""
    if isinstance(process, EDM):
        return "edm"
    return "flow" if isinstance(process, RectifiedFlow) else "noise"
