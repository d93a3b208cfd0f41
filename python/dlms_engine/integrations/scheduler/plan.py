"""Rows of one run, as the fused row reads them, and the times and scales that the pipeline sees."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ...ops import layout
from ...solvers.policy import Policy, Row
from ...solvers.table import SolverTable
from .noise import NoiseModel


@dataclass(frozen=True)
class Rows:
    """A solver's rows, unpacked: float64, shared by all samples.

    Attributes:
        a, b, times: ``[rows]``, ``[rows, depth]``, ``[rows]`` as in ``SolverTable``.
        levels: ``[rows + 1]`` process times of the states: given, before rows 1, 2, .., returned.
        scale: the given state is multiplied by it before the first evaluation.
    """

    a: Tensor
    b: Tensor
    times: Tensor
    levels: Tensor
    scale: float
    prediction: Literal["data", "noise"]

    @property
    def count(self) -> int:
        return int(self.a.shape[0])

    @property
    def depth(self) -> int:
        return int(self.b.shape[1])


def table_rows(table: SolverTable) -> Rows:
    """The rows of ``table``."""
    if table.batch_shape:
        raise ValueError(
            f"the table has batch shape {table.batch_shape}, expected one table for all samples"
        )
    table = table.detach()
    return Rows(
        a=table.a,
        b=table.b,
        times=table.times,
        levels=_levels(table),
        scale=float(table.initial_scale),
        prediction=table.prediction,
    )


def strided_rows(model: NoiseModel, grid: Tensor, stride: int) -> Rows:
    """DDIM as diffusers steps: from each time of ``grid`` down by ``stride`` training levels.

    Where the times are not that far apart ("linspace", or steps that do not divide the levels) the
    next evaluation takes the state for one of its own time, which lies a little elsewhere.
    """
    process, times = model.process, grid[:-1]
    indices = model.timestep(times) - stride
    ends = torch.where(indices > -1e-9, model.time(indices.clamp(min=0)), grid[-1])
    alpha, sigma = process.alpha(times), process.sigma(times)
    a = process.sigma(ends) / sigma
    b = process.alpha(ends) - alpha * a
    return Rows(a, b[:, None], times, torch.cat([times, grid[-1:]]), 1.0, "data")


def _levels(table: SolverTable) -> Tensor:
    steps = table.grid.shape[-1] - 1
    if table.options.get("coordinates") == "edm":  # states are those of the network's times
        return torch.cat([table.grid[:1], table.times[1:], table.grid[-1:]])
    if steps == table.nfe:
        return table.grid
    if steps == table.nfe + 1:  # analytical first step: the given state lies one time earlier
        return torch.cat([table.grid[:1], table.grid[2:]])
    return torch.cat([table.grid[:1], table.times[1:], table.grid[-1:]])


@torch.no_grad()
def policy_rows(policy: Policy) -> Rows:
    """The rows ``policy`` gives for no features: its own where it reads none, else nominal ones."""
    run = policy.start(1, torch.device("cpu"))
    times, rows = [run.time.reshape(-1)[:1]], list[Row]()
    for n in range(policy.nfe):
        rows.append(run.row(n, None))
        following = rows[-1].next_time
        if following is not None:
            times.append(following.reshape(-1)[:1])
    asked = torch.cat(times)
    grid = policy.grid.detach().cpu()
    return Rows(
        a=torch.cat([row.a.reshape(-1)[:1] for row in rows]),
        b=torch.stack([row.b.reshape(-1, row.b.shape[-1])[0] for row in rows]),
        times=asked,
        levels=torch.cat([grid[:1], asked[1:], grid[-1:]]),
        scale=float(run.initial_scale.reshape(-1)[0]),
        prediction=policy.prediction,
    )


def late_start(rows: Rows, begin: int) -> Rows:
    """``rows`` for a run that starts before row ``begin``, where there is no history.

    Outputs from before the start are replaced by the oldest there is: exact for an output that
    does not change, hence first order, like the warm-up of a multistep solver.
    """
    b = rows.b.clone()
    for n in range(begin, rows.count):
        oldest = n - begin
        if oldest + 1 < rows.depth:
            b[n, oldest] += b[n, oldest + 1 :].sum()
            b[n, oldest + 1 :] = 0
    return Rows(rows.a, b, rows.times, rows.levels, rows.scale, rows.prediction)


def spliced(rows: Rows, begin: int, tail: Rows) -> Rows:
    """``rows`` with the rows from ``begin`` on replaced by ``tail``, made for the shorter run."""
    depth = tail.depth
    head = rows.b[:begin, :depth]
    head = torch.nn.functional.pad(head, (0, depth - head.shape[1]))
    return Rows(
        a=torch.cat([rows.a[:begin], tail.a]),
        b=torch.cat([head, tail.b]),
        times=torch.cat([rows.times[:begin], tail.times]),
        levels=torch.cat([rows.levels[:begin], tail.levels]),
        scale=1.0,
        prediction=tail.prediction,
    )


@dataclass(frozen=True)
class StartRows:
    """Packed rows for one start; c_in is 1 there, because pipelines carry the state itself.

    Attributes:
        packed: ``[rows, 6 + depth]`` float64.
        c_in: scale of the network's input at every evaluation, the given state's scale included.
        alpha, sigma: ``[rows]`` at the network's times (for clipping data predictions).
        scale: the given state's, part of row 0; an analytical first step has one.
    """

    packed: Tensor
    c_in: tuple[float, ...]
    alpha: Tensor
    sigma: Tensor
    depth: int
    prediction: Literal["data", "noise"]
    scale: float = 1.0


def make_plan(rows: Rows, model: NoiseModel, begin: int) -> StartRows:
    """Packs ``rows`` for a run whose first evaluation is row ``begin``."""
    pre = model.preconditioning(rows.times, rows.prediction)
    a, c_skip, c_in = rows.a.clone(), pre.c_skip.clone(), pre.c_in.clone()
    if begin == 0:
        for column in (a, c_skip, c_in):
            column[0] *= rows.scale
    packed = layout.pack_rows(
        c_skip=c_skip, c_out=pre.c_out, a=a, c_in_next=torch.ones_like(a), guidance=1.0, b=rows.b
    )
    alpha, sigma = model.process.alpha(rows.times), model.process.sigma(rows.times)
    return StartRows(
        packed, tuple(c_in.tolist()), alpha, sigma, rows.depth, rows.prediction, rows.scale
    )
