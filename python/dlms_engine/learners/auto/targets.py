"""Exact ends of the samples that all stages of a run train on."""

from __future__ import annotations

import torch
from torch import Tensor

from ..start import ExactSolution


class Targets:
    """Exact end states of the training samples, made once and kept."""

    def __init__(self, exact: ExactSolution) -> None:
        self._exact = exact
        self._ends: Tensor | None = None

    @property
    def count(self) -> int:
        """How many there are."""
        return 0 if self._ends is None else len(self._ends)

    @property
    def cost(self) -> int:
        """Network evaluations of one more."""
        return self._exact.table().nfe

    def __call__(self, count: int) -> Tensor:
        """``[count, ...]`` of the samples 0 .. count - 1."""
        if self.count < count:
            more = self._exact.solve(range(self.count, count))
            self._ends = more if self._ends is None else torch.cat([self._ends, more])
        assert self._ends is not None
        return self._ends[:count]
