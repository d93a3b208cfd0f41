"""What every learner is given beside its own settings."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from .training.monitor import Monitor, Silent


@dataclasses.dataclass
class RunOptions:
    """What every method is given beside its own settings."""

    nfe: int
    trajectories: int | None
    output: Path | None
    resume: bool
    progress: bool
    seed: int
    settings: dict[str, Any]
    feature_network: Any = None
    conditions: Any = dataclasses.field(default_factory=dict)
    monitor: Monitor = dataclasses.field(default_factory=Silent)
    identity: dict[str, Any] = dataclasses.field(default_factory=dict)
    """The model and its conditions, for the fingerprint of a checkpoint (``training.identity``)."""

    @property
    def cond(self) -> Any:
        """``conditions`` by their earlier name."""
        return self.conditions

    @property
    def checkpoint(self) -> Path | None:
        """Where the run's checkpoint lives: beside the output, under a name of its own."""
        if self.output is None:
            return None
        stem = self.output.name.removesuffix(".safetensors")
        return self.output.with_name(f"{stem}.checkpoint.safetensors")
