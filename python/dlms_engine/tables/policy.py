"""What the sampler asks for: row n, given the step and the network's features."""

from __future__ import annotations

from typing import Literal, NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor

from ..processes import Process
from .table import SolverTable


class Row(NamedTuple):
    """One row in float64: x_next = a * x + sum_k b[k] * m_{n-k}."""

    a: Tensor  # [] or [B]
    b: Tensor  # [depth] or [B, depth]
    next_time: Tensor | None  # network time of the next evaluation, [] or [B]; None at the end


class PolicyRun(Protocol):
    """State of one run of a policy over one batch."""

    initial_scale: Tensor  # [] or [B] float64: the first network input belongs to scale * noise
    time: Tensor  # [] or [B] float64: network time of the first evaluation

    def row(self, n: int, features: Tensor | None) -> Row:
        """Row ``n`` after evaluation ``n``, whose bottleneck features are ``[B, F]``."""
        ...


@runtime_checkable
class Policy(Protocol):
    """A sampler that decides its rows while it runs; a ``SolverTable`` is the static case."""

    process: Process
    prediction: Literal["data", "noise"]

    @property
    def nfe(self) -> int: ...

    @property
    def depth(self) -> int: ...

    @property
    def t_start(self) -> Tensor | float: ...

    def start(self, batch: int, device: torch.device) -> PolicyRun: ...


class TableRun:
    """A table as a policy run: it ignores the features."""

    def __init__(self, table: SolverTable, device: torch.device) -> None:
        self._a = table.a.to(device)
        self._b = table.b.to(device)
        self._times = table.times.to(device)
        self.initial_scale = table.initial_scale.to(device)
        self.time = self._times[..., 0]

    def row(self, n: int, features: Tensor | None) -> Row:
        last = n + 1 == self._a.shape[-1]
        following = None if last else self._times[..., n + 1]
        return Row(self._a[..., n], self._b[..., n, :], following)
