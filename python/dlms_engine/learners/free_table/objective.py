"""A free table: additive corrections to closed-form coefficients on learned times.

The coefficients stay those of a handcrafted solver *at the learned grid*, plus corrections that
start at zero, over all earlier outputs; network times are learned apart from the grid. It is the
parameterisation of Generalized Solvers (GS, ICLR 2026): coefficients learned without the closed
form do worse, and fitted row by row on one batch they diverge (D-ODE, Table 1).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ... import solvers
from ...engine.adjoint import solve, walk
from ...engine.sampler import Sampler
from ...models.denoiser import Denoiser
from ...solvers.table import SolverTable
from ...support.parallel import World
from ...support.transfer import rows_up
from ..training.learner import Numbers
from ..training.losses import FeatureDistance, last_step_distance, log_distance
from ..training.start_times import refine
from ..training.validation import KeptSolution, Validation
from .module import FreeTableModule
from .settings import FreeTableSettings


class FreeTable:
    """The objective for the shared ``Trainer``."""

    def __init__(
        self,
        denoiser: Denoiser,
        settings: FreeTableSettings,
        shape: tuple[int, ...],
        *,
        feature_network: nn.Module | None = None,
        **conditions: Any,
    ) -> None:
        self.denoiser = denoiser
        self.settings = settings
        self.conditions = conditions
        self.free = FreeTableModule(denoiser, settings)
        self.module: nn.Module = self.free
        self.progress = 0.0
        self._start = float(denoiser.process.sigma(self.free.times.t_max))
        self._distance: FeatureDistance | None = last_step_distance(
            denoiser, settings.last_step, settings.feature_sigma, feature_network
        )
        self._exact = KeptSolution(denoiser, settings.teacher_steps)
        self._validation = Validation(
            denoiser,
            shape,
            settings.validation_samples,
            settings.validation_steps,
            self._distance,
            settings.score,
            conditions,
        )

    # -- learner protocol --------------------------------------------------------------------------

    def parameter_groups(self, lr: float) -> list[dict[str, Any]]:
        s, m = self.settings, self.free
        groups = [
            (s.learn_times, m.times.logits, s.times_lr),
            (s.learn_network_times, m.times.offsets, s.network_times_lr),
            (s.learn_weights, m.outputs, s.weights_lr),
            (s.learn_state, m.state, s.weights_lr),
        ]
        for wanted, parameter, _ in groups:
            parameter.requires_grad_(wanted)
        return [{"params": [p], "lr": lr * factor} for wanted, p, factor in groups if wanted]

    def iteration(self, noise: Tensor) -> Iterator[Numbers]:
        """One batch: the whole run, one reverse sweep."""
        x = self._start * noise
        table = self.free()
        states = solve(self.denoiser, table, x, **self.conditions)
        if self.settings.loss == "endpoint":
            target = self._exact(x, **self.conditions)
            loss = log_distance(states[-1], target, self._distance, World.current())
        else:
            loss = self._trajectory(table, states, x)
        torch.autograd.backward(loss)
        yield {"loss": loss.detach()}

    def _last(self, student: Tensor, target: Tensor) -> Tensor:
        weight = self.settings.last_step_weight
        if self._distance is not None:
            return weight * self._distance(student, target).mean()
        return weight * (student - target).square().flatten(1).sum(1).mean()

    def _trajectory(self, table: SolverTable, states: list[Tensor], x: Tensor) -> Tensor:
        """Every state against the teacher's at the same time, at unit variance, and the end.

        The target moves with the learned time along the teacher's own slope, so that a time is
        charged for where it is and not for standing still.
        """
        process, grid = self.denoiser.process, table.grid
        shift = rows_up((grid - grid.detach()).to(x.dtype), x.device)
        skipped = len(grid) - len(states)
        loss = x.new_zeros(())
        for i, (xt, slope) in self._teacher(grid.detach(), x).items():
            n = i - skipped
            if n < 0 or (n == 0 and skipped == 0):  # before the first row nothing is learned
                continue
            target = xt if slope is None else xt + shift[i] * slope
            if i == len(grid) - 1:
                loss = loss + self._last(states[n], target)
                continue
            norm = float(
                process.alpha(grid[i].detach()) ** 2 + process.sigma(grid[i].detach()) ** 2
            )
            loss = loss + (states[n] - target).square().flatten(1).sum(1).mean() / norm
        return loss

    @torch.no_grad()
    def _teacher(self, grid: Tensor, x: Tensor) -> dict[int, tuple[Tensor, Tensor | None]]:
        """Grid index -> (state, dx/dt there; None at the end)."""
        process, count = self.denoiser.process, self.settings.interpolation + 1
        fine = refine(process, grid, count)
        table = solvers.dpm_solver_pp(process, fine, order=2 if count <= 2 else 3)
        found: dict[int, tuple[Tensor, Tensor | None]] = {}
        for n, (state, data, after) in enumerate(walk(self.denoiser, table, x, **self.conditions)):
            if n and n % count == 0:
                found[n // count] = state, self._slope(state, data, fine[n])
            if n == table.nfe - 1:
                found[len(grid) - 1] = after, None
        return found

    def _slope(self, x: Tensor, data: Tensor, t: Tensor) -> Tensor:
        """dx/dt = alpha' E[x0] + sigma' E[z] of the probability-flow ODE."""
        process = self.denoiser.process
        with torch.enable_grad():
            at = t.detach().clone().requires_grad_()
            alpha, sigma = process.alpha(at), process.sigma(at)
            rates = [
                float(torch.autograd.grad(value, at, retain_graph=True)[0])
                if value.requires_grad  # EDM's alpha is a constant
                else 0.0
                for value in (alpha, sigma)
            ]
        noise = (x - float(alpha.detach()) * data) / float(sigma.detach())
        return rates[0] * data + rates[1] * noise

    def validate(self) -> dict[str, float]:
        with torch.no_grad():
            table = self.free()
        return self._validation.measure(Sampler(self.denoiser, table), self.conditions)

    def describe(self) -> dict[str, Any]:
        with torch.no_grad():
            table = self.free()
        return {"grid": table.grid.tolist(), "network_times": table.times.tolist()}
