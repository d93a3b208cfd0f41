"""One run of a policy over a batch: the coefficients of row n, given the features."""

from __future__ import annotations

from typing import NamedTuple, Protocol

from torch import Tensor


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


class TableRun:
    """A table as a policy run: it ignores the features.

    Args:
        a, b, times, initial_scale: as in ``SolverTable``, on the device of the run.
    """

    def __init__(self, a: Tensor, b: Tensor, times: Tensor, initial_scale: Tensor) -> None:
        self._a, self._b, self._times = a, b, times
        self.initial_scale = initial_scale
        self.time = times[..., 0]

    def row(self, n: int, features: Tensor | None) -> Row:
        last = n + 1 == self._a.shape[-1]
        following = None if last else self._times[..., n + 1]
        return Row(self._a[..., n], self._b[..., n, :], following)
