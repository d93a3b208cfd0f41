"""A free table: additive corrections to closed-form coefficients on learned times.

The coefficients stay those of a handcrafted solver *at the learned grid*, plus corrections that
start at zero, over all earlier outputs; network times are learned apart from the grid. It is the
parameterisation of Generalized Solvers (GS, ICLR 2026): coefficients learned without the closed
form do worse, and fitted row by row on one batch they diverge (D-ODE, Table 1).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from .. import solvers
from ..denoiser import Denoiser
from ..designer import step_coefficients
from ..parallel import World
from ..sampler import Sampler
from ..solvers.common import Afs
from ..table import Prediction, SolverTable
from .adjoint import solve, walk
from .base_table import Base, BaseName
from .endpoint import log_distance
from .grid_tools import GridSource, refine, start_times
from .ld3_grid import LearnedGrid
from .losses import FeatureDistance, last_step_distance
from .validation import Validation, exact_solution


@dataclass(frozen=True)
class FreeTableSettings:
    """Settings of the free table.

    Attributes:
        nfe: network evaluations.
        base: handcrafted solver whose closed form is corrected.
        order: its order; None for its usual one.
        variant: UniPC's B(h).
        afs: analytical first step.
        store: what rows combine, "data" or "noise"; None for the base's own.
        grid: initial times: a name, times, or another learner's solver file (LD3, GITS, ...), whose
            network times are taken too.
        depth: outputs a row may combine; None for all of them (full lower triangle).
        window: largest offset of a network time as a share of the smallest gap.
        learn_times, learn_network_times, learn_weights, learn_state: what is trained: the grid,
            the decoupled times, the weights of outputs, the weights of the state.
        sum_to_base: corrections of a row's output weights add up to zero.
        times_lr, network_times_lr, weights_lr: factors of the learning rate; a weight's correction
            acts on the whole image at once, a step in log time does not.
        loss: "endpoint" against the exact solution, the sum of the logarithms of the mean squared
            pixel and feature distances; or "trajectory": the end and every state on the way,
            against a teacher on the student's own grid.
        last_step: distance of the endpoint: "pixels", "bottleneck" or "features".
        last_step_weight: its factor ("trajectory").
        feature_sigma: noise level of "bottleneck".
        teacher_steps: evaluations of the exact solution ("endpoint").
        interpolation: teacher's points inside each interval ("trajectory").
        validation_samples, validation_steps: fixed set and the evaluations of its exact solution.
        score: what chooses among the parameter sets, "rmse", "features" or "product".
    """

    nfe: int = 5
    base: BaseName = "ipndm"
    order: int | None = None
    variant: Literal["bh1", "bh2"] = "bh2"
    afs: Afs = "dockhorn"
    store: Prediction | None = None
    grid: GridSource = "polynomial"
    depth: int | None = None
    window: float = 0.5
    learn_times: bool = True
    learn_network_times: bool = True
    learn_weights: bool = True
    learn_state: bool = True
    sum_to_base: bool = False
    times_lr: float = 4.0
    network_times_lr: float = 4.0
    weights_lr: float = 0.2
    loss: Literal["endpoint", "trajectory"] = "endpoint"
    last_step: Literal["pixels", "bottleneck", "features"] = "pixels"
    last_step_weight: float = 1.0
    feature_sigma: float = 0.1
    teacher_steps: int = 24
    interpolation: int = 4
    validation_samples: int = 64
    validation_steps: int = 48
    score: Literal["rmse", "features", "product"] = "rmse"

    def __post_init__(self) -> None:
        if self.nfe < 1:
            raise ValueError(f"nfe is {self.nfe}, expected at least 1")
        if self.loss not in ("endpoint", "trajectory"):
            raise ValueError(f"loss is {self.loss!r}, expected 'endpoint' or 'trajectory'")
        if self.depth is not None and self.depth < 1:
            raise ValueError(f"depth is {self.depth}, expected None or at least 1")
        for name, least in (("teacher_steps", 1), ("interpolation", 0), ("validation_samples", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} is {getattr(self, name)}, expected at least {least}")
        trained = (self.learn_times, self.learn_network_times, self.learn_weights, self.learn_state)
        if not any(trained):
            raise ValueError("nothing is learned: set one of the learn_... settings")
        self.solver.steps(self.nfe)

    @property
    def solver(self) -> Base:
        """The base solver."""
        return Base(self.base, self.order, self.variant, self.afs, self.store)

    @property
    def steps(self) -> int:
        return self.solver.steps(self.nfe)


class FreeTableModule(nn.Module):
    """The parameters of a free table and the table they make; float64.

    Attributes:
        times: grid and network times.
        outputs: ``[nfe, depth]`` corrections of the output weights, in units of the row's
            first-order weight; without effect where a row has no output that old.
        state: ``[nfe]`` corrections of the state's weight, in the same unit at unit variance.
    """

    mask: Tensor

    def __init__(self, denoiser: Denoiser, settings: FreeTableSettings) -> None:
        super().__init__()
        process = self.process = denoiser.process
        self.settings = settings
        start = start_times(process, settings.grid, settings.steps)
        self.times = LearnedGrid(
            process, start.grid, network_times=start.network, window=settings.window
        )
        with torch.no_grad():
            base = self.base_table()
        depth = settings.nfe if settings.depth is None else min(settings.depth, settings.nfe)
        self.depth = max(depth, base.depth)
        self.outputs = nn.Parameter(torch.zeros(settings.nfe, self.depth, dtype=torch.float64))
        self.state = nn.Parameter(torch.zeros(settings.nfe, dtype=torch.float64))
        rows, columns = torch.arange(settings.nfe)[:, None], torch.arange(self.depth)
        self.register_buffer("mask", ((columns <= rows) & (columns < depth)).to(torch.float64))

    def base_table(self) -> SolverTable:
        """The handcrafted table at the present times."""
        times = self.times()
        return self.settings.solver.table(self.process, times.grid, times.network)

    def forward(self) -> SolverTable:
        """The corrected table, differentiable in all parameters."""
        table = self.base_table()
        skipped = self.settings.steps - self.settings.nfe
        t, t_next = table.grid[skipped:-1], table.grid[skipped + 1 :]
        _, unit = step_coefficients(self.process, table.prediction, t, t_next)
        norm = torch.sqrt(self.process.alpha(t) ** 2 + self.process.sigma(t) ** 2)
        corrections = self.outputs * self.mask
        if self.settings.sum_to_base:
            corrections = corrections - self.mask * (
                corrections.sum(1, keepdim=True) / self.mask.sum(1, keepdim=True)
            )
        b = torch.nn.functional.pad(table.b, (0, self.depth - table.depth))
        return dataclasses.replace(
            table,
            a=table.a + unit / norm * self.state,
            b=b + unit[:, None] * corrections,
            name="free_table",
            options={**table.options, "solver": table.name},
        )


class FreeTable:
    """The objective for the shared ``Trainer``."""

    def __init__(
        self,
        denoiser: Denoiser,
        settings: FreeTableSettings,
        shape: tuple[int, ...],
        *,
        feature_network: nn.Module | None = None,
        **cond: Any,
    ) -> None:
        self.denoiser = denoiser
        self.settings = settings
        self.cond = cond
        self.free = FreeTableModule(denoiser, settings)
        self.module: nn.Module = self.free
        self.progress = 0.0
        self._start = float(denoiser.process.sigma(self.free.times.t_max))
        self._distance: FeatureDistance | None = last_step_distance(
            denoiser, settings.last_step, settings.feature_sigma, feature_network
        )
        self._validation = Validation(
            denoiser,
            shape,
            settings.validation_samples,
            settings.validation_steps,
            self._distance,
            settings.score,
            cond,
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

    def iteration(self, noise: Tensor) -> Iterator[dict[str, float]]:
        """One batch: the whole run, one reverse sweep."""
        x = self._start * noise
        table = self.free()
        states = solve(self.denoiser, table, x, **self.cond)
        if self.settings.loss == "endpoint":
            target = exact_solution(self.denoiser, x, self.settings.teacher_steps, **self.cond)
            loss = log_distance(states[-1], target, self._distance, World.current())
        else:
            loss = self._trajectory(table, states, x)
        torch.autograd.backward(loss)
        yield {"loss": float(loss.detach())}

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
        skipped = len(grid) - len(states)
        loss = x.new_zeros(())
        for i, (xt, slope) in self._teacher(grid.detach(), x).items():
            n = i - skipped
            if n < 0 or (n == 0 and skipped == 0):  # before the first row nothing is learned
                continue
            target = xt if slope is None else xt + (grid[i] - grid[i].detach()).to(x.dtype) * slope
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
        for n, (state, data, after) in enumerate(walk(self.denoiser, table, x, **self.cond)):
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
        return self._validation.measure(Sampler(self.denoiser, table), self.cond)

    def describe(self) -> dict[str, Any]:
        with torch.no_grad():
            table = self.free()
        return {"grid": table.grid.tolist(), "network_times": table.times.tolist()}
