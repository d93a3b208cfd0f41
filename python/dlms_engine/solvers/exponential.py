"""Exponential integrators in lambda_ = log(alpha / sigma): one step's coefficients.

Both forms solve the linear part exactly and integrate a prediction m over lambda_:

    data:   x_t = (sigma_t / sigma_s) x_s - alpha_t (e^u - 1) m + ...,  u = -h
    noise:  x_t = (alpha_t / alpha_s) x_s - sigma_t (e^u - 1) m + ...,  u = +h

with h = lambda_t - lambda_s (Lu et al. 2022b, eq. 9 and Proposition 4.1). Where lambda_ is infinite
at an end only the first-order term exists, and it is finite.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .common import Evaluation, Node
from .table import Prediction
from .trace import Form

POWERS = torch.arange(20, dtype=torch.float64, device="cpu")
INVERSE_FACTORIALS = torch.tensor(
    [1 / math.factorial(k) for k in range(28)], dtype=torch.float64, device="cpu"
)


def phi(order: int, u: Tensor) -> Tensor:
    """phi_k(u) = sum_j u^j / (j + k)!, k >= 1, without cancellation near u = 0."""
    small = u.detach().abs() < 1
    near = torch.where(small, u, torch.zeros_like(u))
    series = (near[..., None] ** POWERS * INVERSE_FACTORIALS[order : order + len(POWERS)]).sum(-1)
    far = torch.where(small, torch.ones_like(u), u)
    value = torch.expm1(far) / far
    for k in range(1, order):
        value = (value - 1 / math.factorial(k)) / far
    return torch.where(small, series, value)


class ExponentialStep:
    """Coefficients from ``start`` to ``end``: x_t = base x_s + first m - scale (higher terms).

    ``u`` is None where lambda_ is infinite at an end: only the first order is defined there.
    """

    def __init__(self, start: Node, end: Node, prediction: Prediction) -> None:
        if prediction not in ("data", "noise"):
            raise ValueError(f"prediction is {prediction!r}, expected 'data' or 'noise'")
        if prediction == "noise" and start.first:
            raise ValueError(
                f"alpha is 0 at t = {start.t.tolist()}: a noise prediction carries nothing there, "
                "use prediction='data'"
            )
        data = prediction == "data"
        self.scale = end.alpha if data else end.sigma
        self.base = end.sigma / start.sigma if data else end.alpha / start.alpha
        self.u: Tensor | None = None
        if start.lambda_ is None or end.lambda_ is None:
            self.first = end.alpha if data else -end.alpha * start.sigma / start.alpha
            if data and not end.last:
                self.first = end.alpha - end.sigma * start.alpha / start.sigma
            return
        h = end.lambda_ - start.lambda_
        self.u = -h if data else h
        self.first = -self.scale * torch.expm1(self.u)


def predicted(evaluation: Evaluation, prediction: Prediction) -> Form:
    """The prediction an exponential integrator works on."""
    return evaluation.data if prediction == "data" else evaluation.noise


def lambdas(nodes: list[Node]) -> list[Tensor]:
    """Their lambda_, all finite."""
    values = [node.lambda_ for node in nodes if node.lambda_ is not None]
    assert len(values) == len(nodes)
    return values
