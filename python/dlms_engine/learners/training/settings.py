"""Settings of the loop that gradient learners share."""

from __future__ import annotations

import math
from dataclasses import dataclass

from .coerce import check_least


@dataclass(frozen=True)
class TrainerSettings:
    """Settings of the shared loop.

    Attributes:
        trajectories: start noises in all.
        batch: trajectories per optimiser step.
        lr: Adam's learning rate, betas (0.9, 0.999).
        warmup: updates over which the rate rises from 0.
        decay: "constant" or "cosine" to zero at the end.
        clip: largest gradient norm.
        ema_kimg: half-lives of the averaged parameter sets, in thousands of trajectories.
        validate_every: updates between validations; 0 validates at the end only.
        checkpoint_seconds: seconds between checkpoints.
        seed: of the start noise and of the initialisation.
    """

    trajectories: int = 20_000
    batch: int = 32
    lr: float = 5e-3
    warmup: int = 0
    decay: str = "constant"
    clip: float = 1.0
    ema_kimg: tuple[float, ...] = (1.0, 2.0, 3.0)
    validate_every: int = 25
    checkpoint_seconds: float = 60.0
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("trajectories", "batch", "lr", "clip"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} is {getattr(self, name)}, expected a positive number")
        check_least(self, warmup=0, validate_every=0)
        if not all(half_life > 0 for half_life in self.ema_kimg):
            raise ValueError(f"ema_kimg is {self.ema_kimg}, expected positive half-lives")
        if self.decay not in ("constant", "cosine"):
            raise ValueError(f"decay is {self.decay!r}, expected 'constant' or 'cosine'")

    @property
    def updates(self) -> int:
        return math.ceil(self.trajectories / self.batch)
