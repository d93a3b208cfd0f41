"""Problems with known answers, shared by tests, and a plain float64 loop that runs a table."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from dlms_engine.processes import Process
from dlms_engine.solvers.table import SolverTable

DataDenoiser = Callable[[Tensor, Tensor], Tensor]


class GaussianMixture:
    """E[x0 | x_t = x] for equal components N(mu_i, std^2), any process; counts its calls.

    The defaults are the problem of the golden data: d = 16, 5 components.
    """

    def __init__(self, process: Process, means: Tensor | None = None, std: float = 0.3) -> None:
        if means is None:
            means = torch.from_numpy(np.random.default_rng(0).normal(size=(5, 16)) * 1.5)
        self.process, self.means, self.std = process, means, std
        self.calls = 0
        self.asked: list[Tensor] = []

    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        self.calls += 1
        self.asked.append(t.detach())
        t = torch.as_tensor(t, dtype=torch.float64)
        t = t[..., None] if t.ndim else t
        alpha, sigma = self.process.alpha(t), self.process.sigma(t)
        var = alpha**2 * self.std**2 + sigma**2
        distance = ((x[..., None, :] - alpha[..., None] * self.means) ** 2).sum(-1)
        w = torch.softmax(-distance / (2 * var), dim=-1)
        mean = w @ self.means
        return (mean * sigma**2 + x * alpha * self.std**2) / var


class Gaussian:
    """Data N(mean, std^2) per coordinate: the probability flow has a closed form."""

    def __init__(self, process: Process, std: float | Tensor = 0.5, mean: float = 0.0) -> None:
        self.process, self.mean = process, mean
        self.std = torch.as_tensor(std, dtype=torch.float64)
        self.calls = 0

    def _spread(self, t: Tensor) -> Tensor:
        return torch.sqrt(self.process.alpha(t) ** 2 * self.std**2 + self.process.sigma(t) ** 2)

    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        self.calls += 1
        alpha, var = self.process.alpha(t), self._spread(t) ** 2
        return self.mean + alpha * self.std**2 / var * (x - alpha * self.mean)

    def exact(self, x: Tensor, t_from: Tensor, t_to: Tensor) -> Tensor:
        """(x - alpha mean) scales with the marginal's standard deviation."""
        centred = x - self.process.alpha(t_from) * self.mean
        scaled = centred * self._spread(t_to) / self._spread(t_from)
        return self.process.alpha(t_to) * self.mean + scaled


def column(value: Tensor, x: Tensor) -> Tensor:
    """A scalar or ``[B]`` coefficient, broadcastable over ``x`` ``[B, ...]``."""
    return value.reshape(*value.shape, *([1] * (x.ndim - value.ndim))) if value.ndim else value


def run_table(
    table: SolverTable, denoiser: DataDenoiser, x: Tensor, *, states: bool = False
) -> Tensor:
    """Runs a table by its definition; ``states=True`` stacks x_0..x_N in front.

    ``denoiser(x, t)`` gives the data prediction; a noise table converts it at the network's time.
    A batched table ``[B, rows]`` takes ``x`` ``[B, ...]``.
    """
    process, history = table.process, list[Tensor]()
    x = column(table.initial_scale, x) * x
    trail = [x]
    for n in range(table.nfe):
        t = table.times[..., n]
        m = denoiser(x, t)
        if table.prediction == "noise":
            m = (x - column(process.alpha(t), x) * m) / column(process.sigma(t), x)
        history = [m, *history]
        x = column(table.a[..., n], x) * x
        for k in range(table.depth):
            w = table.b[..., n, k]
            if bool((w != 0).any()):
                x = x + column(w, x) * history[k]
        trail.append(x)
    return torch.stack(trail) if states else x
