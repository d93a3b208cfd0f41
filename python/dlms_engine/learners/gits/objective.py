"""GITS: a time grid by dynamic programming (Chen et al., ICML 2024, arXiv:2405.11326).

A fine teacher trajectory is kept; the cost of jumping from its i-th to its j-th time in one Euler
step is measured against it, and the cheapest path with the wanted number of jumps is the grid. The
student solver is not in the loop: the grid then feeds any table maker.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...engine.adjoint import walk
from ...engine.sampler import Sampler
from ...models.denoiser import Denoiser
from ...policies.dlms import step_coefficients
from ...processes.grids import default_grid
from ...solvers import SOLVERS, make_solver
from ...solvers.table import SolverTable
from ...support.parallel import World
from ...support.transfer import host_numbers, to_host
from ...support.values import require_finite
from ..training.noise import unit_noise
from ..training.start_times import start_times
from .settings import GitsSettings


class Trajectories(NamedTuple):
    """Teacher trajectories of one batch."""

    states: Tensor  # [points, B, d] in x / alpha (in x where alpha is 0 at the start)
    jumps: Tensor  # [points - 1, B, d] ring quantity at the start of every step
    end: Tensor  # [B, ...] last state


class Gits:
    """The search on one model."""

    def __init__(
        self,
        denoiser: Denoiser,
        settings: GitsSettings,
        shape: tuple[int, ...],
        samples: int,
        *,
        seed: int = 0,
        world: World | None = None,
        **conditions: Any,
    ) -> None:
        if samples < 1:
            raise ValueError(f"samples is {samples}, expected at least 1")
        self.denoiser, self.settings, self.shape = denoiser, settings, shape
        self.samples, self.seed, self.conditions = samples, seed, conditions
        self.world = world or World()
        process = denoiser.process
        source = default_grid(process) if settings.grid is None else settings.grid
        self.grid = start_times(process, source, settings.points - 1).grid
        order = {} if settings.teacher_order is None else {"order": settings.teacher_order}
        self.teacher = make_solver(settings.teacher, process, self.grid, **order)
        self._ends: list[Tensor] = []  # of the teacher, batch by batch
        self._rescale = float(process.alpha(self.grid[0])) > 0

    def student(self, indices: list[int]) -> SolverTable:
        """The student's table on the teacher's times at ``indices``."""
        s = self.settings
        options: dict[str, Any] = {**s.options, "afs": s.afs}
        if s.order is not None:
            options["order"] = s.order
        return make_solver(s.solver, self.denoiser.process, self.grid[indices], **options)

    @torch.no_grad()
    def search(self) -> tuple[list[int], dict[str, Any]]:
        """Indices of the best grid, and what was tried."""
        s = self.settings
        cost = self.cost()
        first = 2 if s.afs else 1  # leave room for the point that AFS inserts
        candidates: dict[tuple[int, ...], float] = {}
        for gamma in s.gammas:
            path = shortest_path(cost, s.jumps, gamma, first=first)
            inserted = [[0, k, *path[1:]] for k in range(1, path[1])] if s.afs else [path]
            for indices in inserted:
                candidates.setdefault(tuple(indices), gamma)
        paths = list(candidates)
        errors = self.end_errors([self.student(list(path)) for path in paths])
        best = min(range(len(paths)), key=errors.__getitem__)
        tried = [
            {"gamma": candidates[path], "indices": list(path), "rmse": error}
            for path, error in zip(paths, errors, strict=True)
        ]
        return list(paths[best]), {**tried[best], "tried": tried}

    @torch.no_grad()
    def teacher_end(self, noise: Tensor, conditions: dict[str, Any]) -> Tensor:
        """End of the teacher from ``noise`` ``[B, ...]`` at its start."""
        end = Sampler(self.denoiser, self.teacher)(noise, **{**self.conditions, **conditions})
        assert isinstance(end, Tensor)
        return end

    # -- trajectories and costs -------------------------------------------------------------------

    def _batches(self) -> Iterator[Tensor]:
        """Start states of this rank, batch by batch; a function of seed and index alone."""
        start, stop = self.world.slice(self.samples)
        sigma = float(self.denoiser.process.sigma(self.grid[0]))
        for low in range(start, stop, self.settings.batch):
            high = min(low + self.settings.batch, stop)
            yield sigma * unit_noise(self.seed, range(low, high), self.shape, self.denoiser.device)

    def _trajectories(self, noise: Tensor) -> Trajectories:
        run = list(walk(self.denoiser, self.teacher, noise, **self.conditions))
        (states, outputs), end = list(zip(*run, strict=True))[:2], run[-1][2]
        stride = SOLVERS[self.settings.teacher].evaluations_per_step
        every = torch.stack([x.flatten(1) for x in [*states[::stride], end]])
        if self._rescale:
            every = every / self.denoiser.process.alpha(self.grid)[:, None, None].to(every)
        jumps = torch.stack([m.flatten(1) for m in outputs[::stride]])
        return Trajectories(every, jumps, end)

    @torch.no_grad()
    def cost(self) -> Tensor:
        """float64 ``[points, points]`` mean cost of jumping from i to j; infinite for j <= i."""
        points = self.settings.points
        total = torch.zeros(points, points, dtype=torch.float64, device=self.denoiser.device)
        self._ends = []
        for noise in self._batches():
            trajectories = self._trajectories(noise)
            self._ends.append(trajectories.end)
            total += self._batch_cost(trajectories)
        cost = to_host(self.world.sum_(total)) / self.samples
        require_finite(float(cost.sum()), "the cost of the teacher's steps")
        below = torch.ones_like(cost, dtype=torch.bool).tril()
        return cost.masked_fill(below, torch.inf)

    def _batch_cost(self, t: Trajectories) -> Tensor:
        """Sums over the batch."""
        process, states = self.denoiser.process, t.states
        alpha = process.alpha(self.grid)
        chord = Chord(states[0], states[-1])
        cost = states.new_zeros(len(states), len(states), dtype=torch.float64)
        for i, m in enumerate(t.jumps):
            later = self.grid[i + 1 :]
            a, c = step_coefficients(process, self.teacher.prediction, self.grid[i], later)
            if self._rescale:  # x / alpha, the space of the published cost
                a, c = a * alpha[i] / alpha[i + 1 :], c / alpha[i + 1 :]
            reached = a[:, None, None].to(m) * states[i] + c[:, None, None].to(m) * m
            cost[i, i + 1 :] = self._distance(reached, states[i + 1 :], chord).double().sum(1)
        return cost

    def _distance(self, reached: Tensor, wanted: Tensor, chord: Chord) -> Tensor:
        """``[n, B, d]`` twice -> ``[n, B]``."""
        if self.settings.metric == "dev":
            return chord.deviation(reached) - chord.deviation(wanted)
        difference = reached - wanted
        return difference.abs().sum(-1) if self.settings.metric == "l1" else difference.norm(dim=-1)

    @torch.no_grad()
    def end_errors(self, tables: list[SolverTable]) -> list[float]:
        """RMSE between each student's end and the teacher's, on the trajectories of ``cost``."""
        total = torch.zeros(len(tables), dtype=torch.float64, device=self.denoiser.device)
        for noise, end in zip(self._batches(), self._ends, strict=True):
            for k, table in enumerate(tables):
                found = Sampler(self.denoiser, table)(noise, **self.conditions)
                assert isinstance(found, Tensor)
                total[k] += (found - end).double().square().sum()
        count = self.samples * torch.Size(self.shape).numel()
        errors = host_numbers((self.world.sum_(total) / count).sqrt().unbind())
        return [require_finite(error, "the error of a searched grid") for error in errors]


class Chord:
    """The straight line from a trajectory's start to its end, ``[B, d]`` each."""

    def __init__(self, start: Tensor, end: Tensor) -> None:
        self._end = end
        self._direction = torch.nn.functional.normalize(start - end, dim=-1)

    def deviation(self, x: Tensor) -> Tensor:
        """Distances ``[..., B]`` of the points ``x`` ``[..., B, d]`` from the line."""
        offset = x - self._end
        along = (offset * self._direction).sum(-1, keepdim=True)
        distances: Tensor = (offset - along * self._direction).norm(dim=-1)
        return distances


def shortest_path(cost: Tensor, jumps: int, gamma: float, *, first: int = 1) -> list[int]:
    """The cheapest path 0 -> ... -> n - 1 with exactly ``jumps`` jumps.

    Args:
        cost: ``[n, n]``, entry (i, j) is the cost of jumping from i to j > i.
        jumps: between 1 and n - 1.
        gamma: V(j) = min_i c(j, i) + gamma V(i), the k-th jump (from 0) weighs gamma^k.
        first: least length of the first jump.

    Returns:
        ``jumps + 1`` rising indices; the first minimiser where there are several.

    Raises:
        ValueError: no such path.
    """
    n = len(cost)
    if not 1 <= jumps <= n - first:
        raise ValueError(f"jumps is {jumps}, expected 1..{n - first} between {n} times")
    cost = cost.to(torch.float64).masked_fill(
        torch.ones(n, n, dtype=torch.bool, device="cpu").tril(), torch.inf
    )
    value = cost[:, -1].clone()  # of reaching the end from here with one jump
    following: list[Tensor] = []
    for k in range(2, jumps + 1):
        step = cost.clone()
        if k == jumps:
            step[0, :first] = torch.inf
        through = step + gamma * value
        value, choice = through.min(dim=1)
        following.append(choice)
    path = [0]
    for choice in reversed(following):
        path.append(int(choice[path[-1]]))
    return [*path, n - 1]
