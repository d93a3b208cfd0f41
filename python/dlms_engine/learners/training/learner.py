"""What the shared loop needs of an objective."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Protocol

from torch import Tensor, nn

from ...models.denoiser import Denoiser

Numbers = dict[str, Tensor]
"""Name -> a scalar on any device, without graph."""


class Learner(Protocol):
    """An objective over solver parameters."""

    progress: float  # share of the updates that are done, set before each iteration
    denoiser: Denoiser  # start noise is drawn for its device

    @property
    def module(self) -> nn.Module:
        """What is trained."""
        ...

    def parameter_groups(self, lr: float) -> list[dict[str, Any]]: ...

    def iteration(self, noise: Tensor) -> Iterator[Numbers]:
        """Accumulates gradients for one batch of start noise ``[B, ...]`` (unit variance).

        Yields numbers to log, left on the device, each time the optimiser is to step.
        """
        ...

    def validate(self) -> dict[str, float]:
        """Fixed validation; ``"score"`` (lower is better) chooses among the parameter sets."""
        ...

    def describe(self) -> dict[str, Any]:
        """JSON-able snapshot worth logging, e.g. the learned grid."""
        ...
