"""The static export of a designer: its mean rows as a plain table."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..denoiser import Denoiser
from ..policies.dlms import Design, DesignerPolicy
from ..support.transfer import to_host
from ..tables.table import SolverTable
from .sampler import Sampler


class _Recorder(DesignerPolicy):
    """Remembers what the designer said of each step."""

    def __init__(self, policy: DesignerPolicy) -> None:
        super().__init__(policy.designer)
        self.designs: dict[int, Design] = {}

    def design(self, features: Tensor | None, t: Tensor, n: int) -> Design:
        self.designs[n] = super().design(features, t, n)
        return self.designs[n]


class _Fixed(DesignerPolicy):
    """Says the same of each step, whatever it is asked."""

    def __init__(self, policy: DesignerPolicy, designs: dict[int, Design]) -> None:
        super().__init__(policy.designer)
        self._designs = designs

    def design(self, features: Tensor | None, t: Tensor, n: int) -> Design:
        return self._designs[n]


@torch.no_grad()
def static_table(
    policy: DesignerPolicy, denoiser: Denoiser, noise: Tensor, **cond: Any
) -> SolverTable:
    """Mean weights, times and scalings over ``noise`` ``[B, ...]`` (state at the start) as a table.

    The means are taken of what the designer says (weights arithmetically, times geometrically) and
    the rows computed from them, so that the table is consistent: its weights sum to one.
    """
    recorder = _Recorder(policy)
    Sampler(denoiser, recorder, backend="eager")(noise, **cond)
    means = {n: _mean(design) for n, design in recorder.designs.items()}
    run = _Fixed(policy, means).start(1, noise.device)
    times, a, b = [run.time.reshape(1)], [], []
    for n in range(policy.nfe):
        row = run.row(n, None)
        a.append(row.a.reshape(1))
        b.append(row.b.reshape(1, -1))
        if row.next_time is not None:
            times.append(row.next_time.reshape(1))
    settings = policy.designer.settings
    start = policy.designer.grid[:1]
    grid = to_host(torch.cat([start, *(means[n].time.reshape(1) for n in sorted(means))]))
    grid[-1] = to_host(policy.designer.grid[-1])
    return SolverTable(
        process=policy.process,
        a=to_host(torch.cat(a)),
        b=to_host(torch.cat(b)),
        times=to_host(torch.cat(times)),
        t_start=grid[0],
        t_end=grid[-1],
        initial_scale=to_host(run.initial_scale.reshape(())),
        prediction=policy.prediction,
        name=f"dlms-static-{settings.nfe}",
        options={"method": "dlms-static", "order": settings.order, "afs": settings.afs},
        grid=grid,
    )


def _mean(design: Design) -> Design:
    time, network_time = (_geometric(t) for t in (design.time, design.network_time))
    return Design(design.weights.mean(0, keepdim=True), time, network_time)


def _geometric(t: Tensor) -> Tensor:
    return t.clamp_min(1e-300).log().mean().exp().reshape(1)
