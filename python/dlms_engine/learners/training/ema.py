"""Averaged parameter sets with half-lives in thousands of trajectories (DLMS section 3.3)."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class EmaSets:
    """One exponential moving average of a module's parameters for each half-life.

    beta = 0.5 ** (batch / (1000 * half_life)) per update. Like Adam's moments the average is
    corrected for its start, so that short runs are not stuck at the initial parameters.
    """

    def __init__(self, module: nn.Module, half_lives: tuple[float, ...]) -> None:
        self._half_lives = half_lives
        self._sums = {
            f"{h:g}": {n: torch.zeros_like(p) for n, p in module.named_parameters()}
            for h in half_lives
        }
        self._mass = {
            f"{h:g}": torch.zeros((), dtype=torch.float64, device="cpu") for h in half_lives
        }

    @torch.no_grad()
    def update(self, module: nn.Module, batch: int) -> None:
        """Takes in the module's parameters after an update on ``batch`` trajectories."""
        for half_life in self._half_lives:
            key = f"{half_life:g}"
            beta = 0.5 ** (batch / (1000.0 * half_life))
            self._mass[key].mul_(beta).add_(1 - beta)
            for name, parameter in module.named_parameters():
                self._sums[key][name].mul_(beta).add_(parameter, alpha=1 - beta)

    def sets(self) -> dict[str, dict[str, Tensor]]:
        """The averages, by ``"ema<half-life>"``; needs at least one update."""
        return {
            f"ema{key}": {n: v / float(self._mass[key]) for n, v in held.items()}
            for key, held in self._sums.items()
        }

    def tensors(self) -> dict[str, Tensor]:
        """Flat tensors for a checkpoint."""
        flat = {f"{k}/sum/{n}": v for k, held in self._sums.items() for n, v in held.items()}
        return flat | {f"{k}/mass": v for k, v in self._mass.items()}

    def load(self, tensors: dict[str, Tensor]) -> None:
        """Inverse of ``tensors``."""
        for key, held in self._sums.items():
            self._mass[key].copy_(tensors[f"{key}/mass"])
            for name, value in held.items():
                value.copy_(tensors[f"{key}/sum/{name}"])
