"""LD3: learning to discretize (Tong et al. 2024, arXiv:2405.15506): settings and objective.

A global grid and decoupled network times are fitted so that the student's end state matches the
teacher's, from a start noise that may move inside a small ball (soft teacher forcing, section 3.2).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ...engine.adjoint import solve, walk
from ...models.denoiser import Denoiser
from ...processes import grids
from ...solvers import make_solver
from ...solvers.table import SolverTable
from ...support.values import require_finite
from ..training.losses import SampleLoss, resolve_kind, sample_loss
from ..training.start_times import start_times
from .grid import LearnedGrid
from .settings import Ld3Settings

TYPICAL_LOSS = 0.25
"""What LPIPS is for an undistilled few-step student; the published rates were chosen for it."""


class Graded(NamedTuple):
    """One backward pass: losses ``[B]`` and the gradient of their weighted sum in the noise."""

    losses: Tensor
    noise_grad: Tensor


class Ld3:
    """The objective: the student's table, its loss, its gradients."""

    def __init__(
        self,
        denoiser: Denoiser,
        settings: Ld3Settings,
        *,
        feature_network: nn.Module | None = None,
        **conditions: Any,
    ) -> None:
        self.denoiser = denoiser
        self.settings = settings
        self.conditions = conditions
        self.loss = sample_loss(
            settings.loss,
            denoiser,
            feature_sigma=settings.feature_sigma,
            feature_network=feature_network,
            lpips_weights=settings.lpips_weights,
        )
        self.kind = (
            resolve_kind(settings.loss, denoiser, feature_network, settings.lpips_weights)
            if isinstance(settings.loss, str)
            else getattr(settings.loss, "__qualname__", type(settings.loss).__name__)
        )
        process = denoiser.process
        source = "time_uniform" if settings.init in ("uniform", "best") else settings.init
        times = start_times(process, source, settings.steps)
        self.module = LearnedGrid(
            process,
            times.grid,
            network_times=times.network,
            coordinate=settings.coordinate,
            window=settings.window,
        )
        if isinstance(settings.init, str) and settings.init == "uniform":
            nn.init.zeros_(self.module.logits)
        self.sigma_start = float(process.sigma(times.grid[0]))

    # -- student and teacher --------------------------------------------------------------------

    def table(self) -> SolverTable:
        """The student's table, differentiable in the parameters, through UniPC's systems too."""
        times = self.module()
        return self.settings.base.table(self.denoiser.process, times.grid, times.network)

    @torch.no_grad()
    def targets(self, noise: Tensor, **conditions: Any) -> Tensor:
        """The teacher's end states for unit ``noise`` ``[B, ...]``."""
        s, process = self.settings, self.denoiser.process
        source = s.teacher_grid
        if source == "logsnr" and self.module.coordinate == "time":
            source = "time_uniform"
        options = {} if s.teacher_order is None else {"order": s.teacher_order}
        grid = start_times(process, source, s.teacher_nfe).grid
        table = make_solver(s.teacher, process, grid, **options)
        return self._end(table, noise, **conditions)

    def _end(self, table: SolverTable, noise: Tensor, **conditions: Any) -> Tensor:
        end, conditions = noise, {**self.conditions, **conditions}
        for _, _, state in walk(self.denoiser, table, self.sigma_start * noise, **conditions):
            end = state
        return end

    # -- losses -----------------------------------------------------------------------------------

    @torch.no_grad()
    def measure(self, noise: Tensor, target: Tensor) -> Tensor:
        """Losses ``[B]`` of the student from unit ``noise``, without gradients."""
        return self.loss(self._end(self.table(), noise), target)

    def grade(self, noise: Tensor, target: Tensor, weight: float) -> Graded:
        """Accumulates the parameters' gradients of ``weight * sum(losses)``."""
        noise = noise.detach().requires_grad_()
        states = solve(self.denoiser, self.table(), self.sigma_start * noise, **self.conditions)
        losses = self.loss(states[-1], target)
        torch.autograd.backward(weight * losses.sum())
        assert noise.grad is not None
        return Graded(losses.detach(), noise.grad)

    def choose_start(self, mean: Callable[[SampleLoss], float]) -> str:
        """Loads the handcrafted grid with the least mean loss of ``measure``; returns its name."""
        found: list[tuple[float, str, Tensor]] = []
        steps, process = self.settings.steps, self.denoiser.process
        makers: dict[str, Callable[[], Tensor]] = {
            "polynomial": lambda: grids.polynomial(process, steps),
            "time_uniform": lambda: grids.time_uniform(process, steps),
            "time_quadratic": lambda: grids.time_uniform(process, steps, 2.0),
        }
        if self.module.coordinate == "lambda":
            makers["logsnr"] = lambda: grids.logsnr(process, steps)
        for name, make in makers.items():
            grid = make()
            self._load_grid(grid)
            loss = mean(self.measure)
            if math.isfinite(loss):
                found.append((loss, name, grid))
        if not found:
            require_finite(math.nan, "the loss on every handcrafted grid")
        _, name, grid = min(found, key=lambda item: item[0])
        self._load_grid(grid)
        return name

    @torch.no_grad()
    def _load_grid(self, grid: Tensor) -> None:
        fresh = LearnedGrid(self.denoiser.process, grid, coordinate=self.module.coordinate)
        self.module.logits.copy_(fresh.logits)
