"""Where a run stands, in a checkpoint: a killed run goes on and ends at the same bits.

Kept after every iteration of a fit and after the corrector; what was cut short in between is done
again from there. With a budget in evaluations that is the run without the interruption, as the
counters are kept, too.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from ..training.checkpoint import read_checkpoint, save_checkpoint, try_to_save
from .budget import Budget

PHASES = ("start", "trial 1", "trial 2", "fit", "corrector")


@dataclass
class Standing:
    """What a checkpoint holds beside tensors.

    Attributes:
        phase: the one under way or done, of ``PHASES``.
        calls, seconds: used so far.
        targets: exact ends there were.
        better: number of the fit that went on.
        began: share of the budget that was used when the start was found.
        fits: of every fit, its counters.
        corrector: settings and numbers of the trained corrector.
        stages: name -> evaluations and seconds of every stage measured so far.
    """

    phase: str = "start"
    calls: int = 0
    seconds: float = 0.0
    targets: int = 0
    better: int = 0
    began: float = 0.0
    fits: list[dict[str, Any]] = field(default_factory=list)
    corrector: dict[str, Any] = field(default_factory=dict)
    stages: dict[str, list[float]] = field(default_factory=dict)


class RunCheckpoint:
    """Writes and reads the checkpoint of one run.

    Attributes:
        found: what the checkpoint held, with ``tensors``; None for a new run.
        standing: what is kept.

    Raises:
        ValueError: the checkpoint is damaged or of another run.
    """

    def __init__(
        self, path: Path | None, fingerprint: dict[str, Any], budget: Budget, *, resume: bool
    ) -> None:
        self._path, self._fingerprint, self._budget = path, fingerprint, budget
        self.standing, self.tensors = Standing(), dict[str, Tensor]()
        self.found: Standing | None = None
        if resume and path is not None and path.exists():
            self.tensors, state = read_checkpoint(path, fingerprint)
            self.found, self.standing = Standing(**state), Standing(**state)

    def reached(self, phase: str) -> bool:
        """Whether the checkpoint that was found is of ``phase`` or later."""
        if self.found is None:
            return False
        return PHASES.index(self.found.phase) >= PHASES.index(phase)

    def align(self, phase: str) -> None:
        """Ahead of ``phase``: if it was reached, the counters stand where they stood."""
        if self.found is not None and self.reached(phase):
            self._budget.set(self.found.calls, self.found.seconds)

    def keep(self, phase: str, tensors: dict[str, Tensor], **changes: Any) -> None:
        """Writes a checkpoint; a full disk does not end the run."""
        self.standing = dataclasses.replace(
            self.standing,
            phase=phase,
            calls=self._budget.calls,
            seconds=self._budget.seconds,
            **changes,
        )
        self.tensors |= tensors
        path = self._path
        if path is not None:
            try_to_save(
                lambda: save_checkpoint(path, self.tensors, self.standing, self._fingerprint),
                len(self.standing.fits),
            )
