"""A policy's mean decisions over a batch as a plain table."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, Protocol, TypeVar, runtime_checkable

import torch
from torch import Tensor

from ..models.denoiser import Denoiser
from ..solvers.policy import Policy
from ..solvers.run import PolicyRun
from ..solvers.table import SolverTable
from ..support.transfer import to_host
from .run import run_predictions

D = TypeVar("D")


@runtime_checkable
class Deciding(Policy, Protocol[D]):
    """A policy whose rows follow from one decision a step."""

    def decide(self, features: Tensor | None, n: int, at: tuple[Tensor, ...]) -> D:
        """The decision of step ``n`` that starts ``at``, each part ``[B, ...]``."""
        ...

    def mean(self, decision: D) -> D:
        """The mean over the batch, each part ``[1, ...]``."""
        ...

    def run(self, batch: int, device: torch.device) -> PolicyRun:
        """As ``start``, without moving any network."""
        ...

    def static_grid(self, decisions: dict[int, D]) -> Tensor:
        """float64 ``[steps + 1]`` on the CPU: the times of a run with these decisions."""
        ...

    def static_options(self) -> dict[str, Any]:
        """Options of the table made of mean decisions; ``method`` names it."""
        ...


@torch.no_grad()
def mean_decisions(
    policy: Deciding[D], denoiser: Denoiser, noise: Tensor, **conditions: Any
) -> dict[int, D]:
    """Step -> mean decision over ``noise`` ``[B, ...]`` (state at the start), in one run."""
    decisions: dict[int, D] = {}
    decide = policy.decide

    def recorded(features: Tensor | None, n: int, at: tuple[Tensor, ...]) -> D:
        decisions[n] = decide(features, n, at)
        return decisions[n]

    place = denoiser.device if noise.device.type == "cpu" else noise.device
    x = noise.to(place, torch.float32)
    run_predictions(denoiser, deciding(policy, recorded), x, conditions)
    return {n: policy.mean(decision) for n, decision in sorted(decisions.items())}


@torch.no_grad()
def average_table(
    policy: Deciding[D], denoiser: Denoiser, noise: Tensor, **conditions: Any
) -> SolverTable:
    """The mean decisions over ``noise`` ``[B, ...]`` (state at the start) as a plain table.

    What is averaged are the decisions and not the rows, so that the table is consistent: it is the
    sampler that always decides so.
    """
    means = mean_decisions(policy, denoiser, noise, **conditions)
    device = denoiser.device if noise.device.type == "cpu" else noise.device
    run = deciding(policy, lambda _features, n, _at: means[n]).run(1, device)
    times, a, b = [run.time.reshape(1)], [], []
    for n in range(policy.nfe):
        row = run.row(n, None)
        a.append(row.a.reshape(1))
        b.append(row.b.reshape(1, -1))
        if row.next_time is not None:
            times.append(row.next_time.reshape(1))
    grid, options = policy.static_grid(means), policy.static_options()
    return SolverTable(
        process=policy.process,
        a=to_host(torch.cat(a)),
        b=to_host(torch.cat(b)),
        times=to_host(torch.cat(times)),
        t_start=grid[0],
        t_end=grid[-1],
        initial_scale=to_host(run.initial_scale.reshape(-1)[0]),
        prediction=policy.prediction,
        name=f"{options['method']}-{policy.nfe}",
        options=options,
        grid=grid,
    )


def deciding(
    policy: Deciding[D], decide: Callable[[Tensor | None, int, tuple[Tensor, ...]], D]
) -> Deciding[D]:
    """A copy of ``policy``, sharing its networks, that decides by ``decide``."""
    twin = copy.copy(policy)
    vars(twin)["decide"] = decide  # goes before the method of the class
    return twin
