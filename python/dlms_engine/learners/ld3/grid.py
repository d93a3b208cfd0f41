"""Learned time grids: LD3's softmax-cumsum steps and decoupled network times.

Tong et al. 2024 (arXiv:2405.15506), section 3.3. The softmax runs over the N step sizes and its
cumulative sums are normalised by nothing: the head entry of the paper's N + 1 logits cancels, so it
is left out, and both ends are constants, exact and without gradient.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from ...processes import Process

Coordinate = Literal["lambda", "time"]


class GridTimes(NamedTuple):
    """float64 ``[N + 1]``, decreasing grid and the times the network is called with."""

    grid: Tensor
    network: Tensor


def natural_coordinate(process: Process, grid: Tensor) -> Coordinate:
    """``"lambda"`` where lambda_ is finite at both ends, else ``"time"`` (flows)."""
    ends = process.lambda_(grid[[0, -1]])
    return "lambda" if bool(torch.isfinite(ends).all()) else "time"


def softmax_grid(
    process: Process, logits: Tensor, coordinate: Coordinate, t_max: Tensor, t_min: Tensor
) -> Tensor:
    """``[N]`` logits -> ``[N + 1]`` decreasing times from ``t_max`` to ``t_min``, ends exact.

    ``"lambda"``: logit i is of the step lambda_{i+1} - lambda_i. ``"time"``: logit j is of the
    j-th step counted from the end of sampling, as in the official parameterisation.
    """
    steps = torch.softmax(logits, dim=0)
    if coordinate == "lambda":
        first, last = process.lambda_(t_max), process.lambda_(t_min)
        inner = process.inverse_lambda(first + steps.cumsum(0)[:-1] * (last - first))
    else:
        inner = (t_min + steps.cumsum(0)[:-1] * (t_max - t_min)).flip(0)
    return torch.cat([t_max.reshape(1), inner, t_min.reshape(1)])


def grid_logits(process: Process, grid: Tensor, coordinate: Coordinate) -> Tensor:
    """The logits ``[N]`` whose ``softmax_grid`` is ``grid``: log of the relative step sizes.

    Raises:
        ValueError: lambda_ is infinite at an end and ``coordinate`` is ``"lambda"``.
    """
    if coordinate == "lambda":
        values = process.lambda_(grid)
        if not bool(torch.isfinite(values).all()):
            raise ValueError(
                f"coordinate='lambda' needs finite lambda_ on the grid, got {values.tolist()}: "
                "set coordinate='time'"
            )
        steps = values.diff()
    else:
        steps = -grid.diff().flip(0)
    return (steps / steps.mean()).log().detach()


def decoupled_times(
    process: Process,
    grid: Tensor,
    offsets: Tensor,
    coordinate: Coordinate,
    *,
    window: float = 0.5,
    limit: float | None = None,
) -> Tensor:
    """Network times ``[N + 1]``: interior grid times moved by ``offsets`` ``[N - 1]``, ends kept.

    An offset is additive in the coordinate and clamped to ``window`` times the smallest gap of the
    *grid in that coordinate* (detached). The official code takes the gap of the raw logits in
    lambda mode, which is 0 at the start, so that its network times cannot move; ``limit`` replaces
    the bound to reproduce that.
    """
    if len(grid) == 2:
        return grid
    inner = grid[1:-1]
    values = process.lambda_(grid) if coordinate == "lambda" else grid
    if limit is None:
        limit = window * float(values.detach().diff().abs().min())
    # as a tensor: torch 2.14 passes no gradient where numbers leave no room at all
    bound = offsets.new_tensor(limit)
    moved = values[1:-1] + offsets.clamp(-bound, bound)
    inner = process.inverse_lambda(moved) if coordinate == "lambda" else moved
    return torch.cat([grid[:1], inner, grid[-1:]])


class LearnedGrid(nn.Module):
    """Step sizes and network times as parameters, float64.

    Args:
        process: the diffusion process.
        grid: ``[N + 1]`` the initial grid; its ends stay.
        network_times: ``[N + 1]`` initial network times, None for the grid's own.
        coordinate: what steps and offsets are measured in; None for ``natural_coordinate``.
        window: largest offset as a share of the smallest gap.

    Attributes:
        logits: ``[N]``, xi of the paper without its redundant head.
        offsets: ``[N - 1]``, xi^c of the paper without its masked ends.
    """

    t_max: Tensor
    t_min: Tensor

    def __init__(
        self,
        process: Process,
        grid: Tensor,
        *,
        network_times: Tensor | None = None,
        coordinate: Coordinate | None = None,
        window: float = 0.5,
    ) -> None:
        super().__init__()
        if coordinate not in (None, "lambda", "time"):
            raise ValueError(f"coordinate is {coordinate!r}, expected None, 'lambda' or 'time'")
        if not 0 < window < 1:
            raise ValueError(f"window is {window}, expected a number in (0, 1)")
        grid = grid.detach().to(torch.float64)
        self.process = process
        self.coordinate: Coordinate = coordinate or natural_coordinate(process, grid)
        self.window = window
        self.register_buffer("t_max", grid[0].clone())
        self.register_buffer("t_min", grid[-1].clone())
        self.logits = nn.Parameter(grid_logits(process, grid, self.coordinate))
        self.offsets = nn.Parameter(self._initial_offsets(grid, network_times))

    def _initial_offsets(self, grid: Tensor, network_times: Tensor | None) -> Tensor:
        inner = grid[1:-1]
        if network_times is None:
            return torch.zeros_like(inner)
        asked = network_times.detach().to(torch.float64)[1:-1]
        if self.coordinate == "lambda":
            return self.process.lambda_(asked) - self.process.lambda_(inner)
        return asked - inner

    def forward(self) -> GridTimes:
        """The grid and the network times, differentiable in both parameters."""
        grid = softmax_grid(self.process, self.logits, self.coordinate, self.t_max, self.t_min)
        asked = decoupled_times(
            self.process, grid, self.offsets, self.coordinate, window=self.window
        )
        return GridTimes(grid, asked)
