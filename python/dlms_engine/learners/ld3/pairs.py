"""Pairs of start noise and teacher's end state, in fixed mini-batches shared out over the ranks."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ...support.parallel import World
from ...support.transfer import host_numbers


class Pairs:
    """Triples (moved noise, noise, target) of LD3's Algorithm 1, in unit-noise coordinates.

    A rank owns the same samples of a mini-batch in every pass, so that moved noises need not be
    exchanged but for a checkpoint.

    Attributes:
        centres: ``[n, ...]`` the noises drawn.
        noise: ``[n, ...]`` where they are now.
        target: ``[n, ...]`` the teacher's end states of the centres; this rank's rows only.
    """

    def __init__(self, centres: Tensor, batch: int, world: World) -> None:
        self.centres = centres
        self.noise = centres.clone()
        self.target = torch.zeros_like(centres)
        self.batch = batch
        self._world = world

    def solve(self, teacher: Callable[[Tensor], Tensor], bar: Any) -> None:
        """Fills ``target``, mini-batch by mini-batch."""
        for k in range(self.count):
            own = self.own(k)
            if own.stop > own.start:
                self.target[own] = teacher(self.centres[own])
            bar.update()

    @property
    def count(self) -> int:
        """Mini-batches in a pass."""
        return math.ceil(len(self.centres) / self.batch)

    def size(self, k: int) -> int:
        """Samples of mini-batch ``k`` over all ranks."""
        return min(self.batch, len(self.centres) - k * self.batch)

    def own(self, k: int) -> slice:
        """The rank's share of mini-batch ``k``; may be empty."""
        start, stop = self._world.slice(self.size(k))
        return slice(k * self.batch + start, k * self.batch + stop)

    def measure(
        self, loss: Callable[[Tensor, Tensor], Tensor], batches: int | None = None
    ) -> float:
        """Mean loss over all ranks, of the first ``batches`` mini-batches (None: all)."""
        total = self.noise.new_zeros(2, dtype=torch.float64)
        for k in range(self.count if batches is None else batches):
            own = self.own(k)
            if own.stop > own.start:
                losses = loss(self.noise[own], self.target[own])
                total[0] += losses.double().sum()
                total[1] += len(losses)
        self._world.sum_(total)
        return host_numbers([total[0] / total[1]])[0]

    def gathered(self) -> Tensor:
        """``noise``, every row from the rank that owns it; all ranks must call it."""
        if self._world.size == 1:
            return self.noise
        rows = torch.zeros_like(self.noise)
        for k in range(self.count):
            rows[self.own(k)] = self.noise[self.own(k)]
        self._world.sum_(rows)
        return rows


def project(noise: Tensor, centre: Tensor, radius: float) -> Tensor:
    """The point of the ball of ``radius`` around ``centre`` nearest to ``noise``, per sample."""
    offset = (noise - centre).flatten(1)
    norm = offset.square().sum(1, keepdim=True).sqrt()
    shrink = (radius / norm.clamp_min(1e-30)).clamp_max(1.0)
    return centre + (offset * shrink).reshape_as(centre)
